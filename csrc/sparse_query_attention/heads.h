// Rows of one head: where they lie, how they are read, rotated and written; which keys a query sees.
#pragma once

#include <cstdint>

#include "simd/vector.h"
#include "sparse_query_attention/kernels.h"

namespace rxt::RXT_INSTRUCTION_SET::attention {

inline int64_t round_up(int64_t count, int64_t multiple) { return (count + multiple - 1) / multiple * multiple; }

// Output heads, how many of them read one key/value head, and the query head of each.
inline int64_t head_count(const AttentionForward& a) { return a.query_heads > a.key_heads ? a.query_heads : a.key_heads; }
inline int64_t heads_per_key(const AttentionForward& a) { return head_count(a) / a.key_heads; }
inline int64_t query_head(const AttentionForward& a, int64_t head) { return head % a.query_heads; }

template <class Element>
inline Element* head_at(void* base, const HeadStrides& strides, int64_t batch, int64_t time, int64_t head) {
    return static_cast<Element*>(base) + batch * strides.batch + time * strides.time + head * strides.head;
}

template <class Element>
inline const Element* head_at(const void* base, const HeadStrides& strides, int64_t batch, int64_t time, int64_t head) {
    return static_cast<const Element*>(base) + batch * strides.batch + time * strides.time + head * strides.head;
}

// Whether products are of queries and keys that are rounded to bfloat16 after they are rotated.
inline bool rounds_heads(const AttentionForward& a) {
    return RXT_HAS_BFLOAT16_DOT && !attention_is_short(a) && (a.rounded || a.dtype == DType::bfloat16);
}

inline void round_head(int64_t width, float* head) {
    for (int64_t i = 0; i < width; ++i) head[i] = to_float(to_bfloat16(head[i]));
}

// How many of the first keys row `batch` may see: those behind are padding.
inline int64_t keys_of(const AttentionForward& a, int64_t batch) {
    int64_t keys = a.key_time;
    if (a.key_lengths != nullptr && a.key_lengths[batch] < keys) keys = a.key_lengths[batch] > 0 ? a.key_lengths[batch] : 0;
    if (a.key_mask != nullptr) {
        const bool* mask = a.key_mask + batch * a.key_mask_stride;
        while (keys > 0 && !mask[keys - 1]) --keys;
    }
    return keys;
}

inline bool is_causal(const AttentionForward& a) { return a.causal && a.query_time > 1; }

// How many of the first `keys` keys the query at `time` may see.
inline int64_t seen_by(const AttentionForward& a, int64_t time, int64_t keys) {
    if (!is_causal(a)) return keys;
    const int64_t last = a.key_time - a.query_time + time + 1;
    return last < keys ? (last > 0 ? last : 0) : keys;
}

// Widened to fp32.
template <class Element>
inline void read_head(const Element* source, int64_t width, float* target) {
    for (int64_t i = 0; i < width; i += Float::lanes) store_up_to(target + i, load_up_to(source + i, width - i), width - i);
}

template <class Element>
inline void write_head(Element* target, int64_t width, const float* source) {
    for (int64_t i = 0; i < width; i += Float::lanes) store_up_to(target + i, load_up_to(source + i, width - i), width - i);
}

// The sum of weighted values `mixed` becomes the output of a query; without keys that is 0.
template <class Element>
inline void write_result(const AttentionForward& a, int64_t batch, int64_t time, int64_t head, float largest_score, float total,
                         float* mixed) {
    const float share = total == 0.0f ? 0.0f : 1.0f / total;
    for (int64_t i = 0; i < a.head_dim; ++i) mixed[i] *= share;
    write_head(head_at<Element>(a.out, a.out_strides, batch, time, head), a.head_dim, mixed);
    if (a.softmax_sums == nullptr) return;
    float* sums = a.softmax_sums + (batch * head_count(a) + head) * a.query_time + time;
    sums[0] = largest_score;
    sums[a.batch * head_count(a) * a.query_time] = total;
}

// Turns the pairs of `head` by the angles at (batch, time), in place.
inline void rotate(const RotaryTable& table, int64_t batch, int64_t time, bool split, int64_t width, float* head) {
    const int64_t offset = batch * table.batch_stride + time * table.time_stride, half = width / 2;
    const float* cosine = table.cosine + offset;
    const float* sine = table.sine + offset;
    float turned[attention_largest_head];
    const int64_t step = split ? 1 : 2, second = split ? half : 1;
    for (int64_t j = 0; j < half; ++j) {
        const float x = head[2 * j], y = head[2 * j + 1];
        turned[j * step] = x * cosine[j] - y * sine[j];
        turned[j * step + second] = x * sine[j] + y * cosine[j];
    }
    for (int64_t i = 0; i < width; ++i) head[i] = turned[i];
}

// The inverse, which is also the transpose: what a gradient goes through.
inline void unrotate(const RotaryTable& table, int64_t batch, int64_t time, bool split, int64_t width, float* head) {
    const int64_t offset = batch * table.batch_stride + time * table.time_stride, half = width / 2;
    const float* cosine = table.cosine + offset;
    const float* sine = table.sine + offset;
    float turned[attention_largest_head];
    const int64_t step = split ? 1 : 2, second = split ? half : 1;
    for (int64_t j = 0; j < half; ++j) {
        const float x = head[j * step], y = head[j * step + second];
        turned[2 * j] = x * cosine[j] + y * sine[j];
        turned[2 * j + 1] = y * cosine[j] - x * sine[j];
    }
    for (int64_t i = 0; i < width; ++i) head[i] = turned[i];
}

}  // namespace rxt::RXT_INSTRUCTION_SET::attention

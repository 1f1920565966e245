#include "rotary/kernels.h"

#include "core/parallel.h"
#include "simd/vector.h"

namespace rxt::RXT_INSTRUCTION_SET {

namespace {

struct Pairs {
    Float first, second;
};

// `count` pairs, or as many as a vector has, from pair j on: neighbours, or `half` values apart.
template <bool split, class Element>
inline Pairs load_pairs(const Element* head, int64_t half, int64_t j, int64_t count) {
    if (split) return {load_up_to(head + j, count), load_up_to(head + half + j, count)};
    float first[Float::lanes] = {}, second[Float::lanes] = {};
    const Element* from = head + 2 * j;
    const auto spread = [&](int64_t lanes) __attribute__((always_inline)) {
        for (int64_t lane = 0; lane < lanes; ++lane) {
            first[lane] = to_float(from[2 * lane]);
            second[lane] = to_float(from[2 * lane + 1]);
        }
    };
    count >= Float::lanes ? spread(Float::lanes) : spread(count);  // a constant becomes shuffles
    return {load(first), load(second)};
}

template <bool split, class Element>
inline void store_pairs(Element* head, int64_t half, int64_t j, int64_t count, const Pairs& pairs) {
    if (split) {
        store_up_to(head + j, pairs.first, count);
        store_up_to(head + half + j, pairs.second, count);
        return;
    }
    float first[Float::lanes], second[Float::lanes];
    store(first, pairs.first);
    store(second, pairs.second);
    Element* to = head + 2 * j;
    const auto join = [&](int64_t lanes) __attribute__((always_inline)) {
        for (int64_t lane = 0; lane < lanes; ++lane) {
            assign(to[2 * lane], first[lane]);
            assign(to[2 * lane + 1], second[lane]);
        }
    };
    count >= Float::lanes ? join(Float::lanes) : join(count);
}

template <bool split_from, bool split_to, class Element>
void turn(const Rotary& a) {
    const Float direction = broadcast(a.inverse ? -1.0f : 1.0f);
    parallel_for(a.batch * a.time, 8.0 * a.batch * a.time * a.heads * a.half, [&](int64_t token) {
        const int64_t batch = token / a.time, time = token % a.time;
        const Element* x = static_cast<const Element*>(a.x) + batch * a.batch_stride + time * a.time_stride;
        Element* out = static_cast<Element*>(a.out) + token * a.heads * 2 * a.half;
        const int64_t angles = batch * a.table_batch_stride + time * a.half;
        for (int64_t j = 0; j < a.half; j += Float::lanes) {
            const int64_t left = a.half - j;
            const Float cosine = load_up_to(a.cosine + angles + j, left);
            const Float sine = load_up_to(a.sine + angles + j, left) * direction;
            for (int64_t head = 0; head < a.heads; ++head) {
                const Pairs x_pairs = load_pairs<split_from>(x + head * a.head_stride, a.half, j, left);
                const Float first = multiply_add(x_pairs.first, cosine, zero() - x_pairs.second * sine);
                const Float second = multiply_add(x_pairs.first, sine, x_pairs.second * cosine);
                store_pairs<split_to>(out + head * 2 * a.half, a.half, j, left, {first, second});
            }
        }
    });
}

template <class Element>
void turn_as_laid_out(const Rotary& a) {
    if (!a.split) return turn<false, false, Element>(a);
    a.inverse ? turn<true, false, Element>(a) : turn<false, true, Element>(a);
}

}  // namespace

void rotary(const Rotary& a) {
    a.dtype == DType::float32 ? turn_as_laid_out<float>(a) : turn_as_laid_out<BFloat16>(a);
}

}  // namespace rxt::RXT_INSTRUCTION_SET

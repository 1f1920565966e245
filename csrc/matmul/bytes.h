// The product of rows and weights of 8 bits for decoding. To unpack weights to fp32 takes longer than to read them from memory, so
// rows are rounded to 16 bits instead, each with a scale of its own, and the sums are sums of integers: exact, whatever their order.
// A row is off by 1/65534 of its largest value at most, a hundredth of what weights of 8 bits are.
#pragma once

#include "matmul/stream.h"

namespace rxt::RXT_INSTRUCTION_SET {

// Rows rounded to 16 bits: row i is scales[i] * (values + i * stride).
struct RoundedRows {
    int16_t* values;
    float* scales;
    int64_t stride;  // even, at least as long as a row
};

// A row with a value that is not finite has NaN for its scale.
inline void round_row(const float* row, int64_t inputs, int16_t* values, float* scale) {
    constexpr float most = 32767.0f, least = 1e-30f;
    Float top = zero(), check = zero();
    for (int64_t k = 0; k < inputs; k += Float::lanes) {
        const Float x = load_up_to(row + k, inputs - k);
        top = maximum(top, maximum(x, zero() - x));
        check = multiply_add(x, zero(), check);  // NaN, where x is not finite
    }
    const float largest_value = largest(top), checked = sum(check);
    const float inverse = checked == 0.0f && largest_value > least ? most / largest_value : 0.0f;
    *scale = inverse > 0.0f ? largest_value / most : checked;
    for (int64_t k = 0; k < inputs; ++k)
        values[k] = inverse > 0.0f ? static_cast<int16_t>(__builtin_rintf(row[k] * inverse)) : int16_t{0};
    if (inputs % 2 != 0) values[inputs] = 0;
}

namespace detail {

// A vector of sums, and sums + the pairs of weights at `at` times a pair of inputs.
#if RXT_SET_NUMBER(RXT_INSTRUCTION_SET) == RXT_SET_portable

struct IntegerSums {
    Integer value;
};

inline IntegerSums no_sums() { return {Integer{}}; }

inline IntegerSums add_pairs(IntegerSums sums, const int8_t* at, int32_t pair) {
    const auto low = static_cast<int16_t>(pair), high = static_cast<int16_t>(pair >> 16);
    for (int lane = 0; lane < Float::lanes; ++lane) sums.value[lane] += at[2 * lane] * low + at[2 * lane + 1] * high;
    return sums;
}

inline Float to_floats(IntegerSums sums) { return {__builtin_convertvector(sums.value, Float::Register)}; }

#elif RXT_SET_NUMBER(RXT_INSTRUCTION_SET) == RXT_SET_avx2

struct IntegerSums {
    __m256i value;
};

inline IntegerSums no_sums() { return {_mm256_setzero_si256()}; }

inline IntegerSums add_pairs(IntegerSums sums, const int8_t* at, int32_t pair) {
    const __m256i weights = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
    return {_mm256_add_epi32(sums.value, _mm256_madd_epi16(weights, _mm256_set1_epi32(pair)))};
}

inline Float to_floats(IntegerSums sums) { return {_mm256_cvtepi32_ps(sums.value)}; }

#else

struct IntegerSums {
    __m512i value;
};

inline IntegerSums no_sums() { return {_mm512_set1_epi32(0)}; }

inline IntegerSums add_pairs(IntegerSums sums, const int8_t* at, int32_t pair) {
    const __m512i weights = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
#if RXT_HAS_INTEGER_DOT
    return {_mm512_dpwssd_epi32(sums.value, weights, _mm512_set1_epi32(pair))};
#else
    return {_mm512_add_epi32(sums.value, _mm512_madd_epi16(weights, _mm512_set1_epi32(pair)))};
#endif
}

inline Float to_floats(IntegerSums sums) { return {_mm512_cvtepi32_ps(sums.value)}; }

#endif

// Inputs whose sum cannot pass 32 bits: 512 * 32767 * 127 < 2^31.
constexpr int64_t inputs_of_sum = 512;

template <int rows, int panels>
__attribute__((noinline)) void bytes_tile(const int16_t* const* a, const float* row_scales, const int8_t* weights,
                                          int64_t distance, const float* scales, int64_t inputs, float* out) {
    const int64_t pairs = (inputs + 1) / 2;
    for (int64_t first = 0; first < pairs; first += inputs_of_sum / 2) {
        const int64_t last = pairs - first < inputs_of_sum / 2 ? pairs : first + inputs_of_sum / 2;
        IntegerSums sum[rows][panels][vectors_per_panel];
        RXT_UNROLL
        for (int r = 0; r < rows; ++r)
            RXT_UNROLL
            for (int p = 0; p < panels; ++p)
                RXT_UNROLL
                for (int v = 0; v < vectors_per_panel; ++v) sum[r][p][v] = no_sums();
        for (int64_t k = first; k < last; ++k) {
            RXT_UNROLL
            for (int r = 0; r < rows; ++r) {
                int32_t pair;
                std::memcpy(&pair, a[r] + 2 * k, sizeof pair);
                RXT_UNROLL
                for (int p = 0; p < panels; ++p)
                    RXT_UNROLL
                    for (int v = 0; v < vectors_per_panel; ++v)
                        sum[r][p][v] = add_pairs(
                            sum[r][p][v], weights + p * distance + 2 * (k * panel_width + v * Float::lanes), pair);
            }
        }
        RXT_UNROLL
        for (int r = 0; r < rows; ++r)
            RXT_UNROLL
            for (int p = 0; p < panels; ++p)
                RXT_UNROLL
                for (int v = 0; v < vectors_per_panel; ++v) {
                    const int64_t place = p * panel_width + v * Float::lanes;
                    float* target = out + r * Sums::stride + place;
                    const Float part = to_floats(sum[r][p][v]) * (load(scales + place) * broadcast(row_scales[r]));
                    store(target, first == 0 ? part : load(target) + part);
                }
    }
}

template <int rows, int beside>
inline void bytes_across(const int16_t* const* a, const float* row_scales, const int8_t* weights, int64_t distance,
                         const float* scales, int64_t inputs, int panels, float* out) {
    int p = 0;
    for (; p + beside <= panels; p += beside)
        bytes_tile<rows, beside>(a, row_scales, weights + p * distance, distance, scales + p * panel_width, inputs,
                                 out + p * panel_width);
    if constexpr (beside > 1) {
        if (p < panels)
            bytes_across<rows, beside / 2>(a, row_scales, weights + p * distance, distance, scales + p * panel_width,
                                           inputs, panels - p, out + p * panel_width);
    }
}

template <int most_rows>
inline void bytes_rows_across(int rows, const int16_t* const* a, const float* row_scales, const int8_t* weights,
                              int64_t distance, const float* scales, int64_t inputs, int panels, float* out) {
    if constexpr (most_rows > 1) {
        if (rows < most_rows)
            return bytes_rows_across<most_rows - 1>(rows, a, row_scales, weights, distance, scales, inputs, panels, out);
    }
    bytes_across<most_rows, panels_beside(most_rows)>(a, row_scales, weights, distance, scales, inputs, panels, out);
}

}  // namespace detail

// As stream(), for rows that were rounded; place(i) is the number of row i among them.
template <class Place, class Epilogue>
inline void stream_bytes(int64_t rows, const RoundedRows& rounded, Place place, const Panels<int8_t>& weights,
                         int64_t first_panel, int64_t last_panel, Epilogue&& epilogue) {
    const auto group = [&](int64_t first, int count, int64_t panel, int panels, float* values) {
        const int16_t* addresses[stream_rows];
        float scales[stream_rows];
        for (int r = 0; r < count; ++r) {
            addresses[r] = rounded.values + place(first + r) * rounded.stride;
            scales[r] = rounded.scales[place(first + r)];
        }
        detail::bytes_rows_across<stream_rows>(count, addresses, scales, weights.panel(panel),
                                               weights.elements_of_one(), weights.scales + panel * panel_width,
                                               weights.inputs, panels, values);
    };
    stream_tiles(rows, first_panel, last_panel, group, epilogue);
}

}  // namespace rxt::RXT_INSTRUCTION_SET

// Products with weights where they are, in either layout, for many rows: panels are packed on the way into memory of the thread that
// needs them, where all rows meet them.
#pragma once

#include "core/scratch.h"
#include "matmul/matrix.h"
#include "matmul/multiply.h"
#include "matmul/pairs.h"
#include "matmul/unpacked.h"
#include "simd/transpose.h"

namespace rxt::RXT_INSTRUCTION_SET {

namespace detail {

constexpr int64_t packed_outputs = tile_panels * panel_width;

static inline int64_t at_most(int64_t count, int64_t most) { return count < most ? count : most; }

// Rows that are far apart come from memory one by one, unless they are asked for early enough: so many rows before.
constexpr int64_t rows_ahead = 12;

template <class Element>
inline void fetch(const Element* row, int64_t count) {
    constexpr int64_t line = 64 / static_cast<int64_t>(sizeof(Element));
    for (int64_t i = 0; i < count; i += line) __builtin_prefetch(row + i);
}

// Panels [panel][input][16] of inputs whose outputs are neighbours, from input_row(k) on.
template <class InputRow>
inline void pack_inputs(const InputRow& input_row, int64_t inputs, int64_t outputs, float* panels) {
    for (int64_t first = 0; first < outputs; first += panel_width, panels += inputs * panel_width)
        for (int64_t k = 0; k < inputs; ++k) {
            if (first == 0 && k + rows_ahead < inputs) fetch(input_row(k + rows_ahead), outputs);
            const auto* source = input_row(k) + first;
            for (int64_t i = 0; i < panel_width; i += Float::lanes) {
                const int64_t left = outputs - first - i;
                store(panels + k * panel_width + i, left > 0 ? load_up_to(source + i, left) : zero());
            }
        }
}

// The same where the inputs of an output are neighbours, and outputs lie `stride` apart.
template <class Element>
inline void pack_outputs(const Element* source, int64_t stride, int64_t inputs, int64_t outputs, float* panels) {
    for (int64_t first = 0; first < outputs; first += panel_width, panels += inputs * panel_width) {
        const int64_t present = at_most(outputs - first, panel_width);
        const Element* rows = source + first * stride;
        int64_t k = 0;
        if (present == panel_width) {
            for (; k + Float::lanes <= inputs; k += Float::lanes)
                for (int64_t i = 0; i < panel_width; i += Float::lanes)
                    transpose_square(rows + i * stride + k, stride, panels + k * panel_width + i, panel_width);
        }
        for (; k < inputs; ++k)
            for (int64_t i = 0; i < panel_width; ++i)
                panels[k * panel_width + i] = i < present ? to_float(rows[i * stride + k]) : 0.0f;
    }
}

// The panel of `outputs` outputs of a matrix from `first` on.
template <class Element>
inline void pack_panel(const Matrix& weight, int64_t first, int64_t outputs, float* panel) {
    const Element* source = static_cast<const Element*>(weight.data) + first * weight.output_stride;
    if (weight.output_stride == 1) {
        pack_inputs([&](int64_t k) { return source + k * weight.input_stride; }, weight.inputs, outputs, panel);
    } else {
        pack_outputs(source, weight.output_stride, weight.inputs, outputs, panel);
    }
}

}  // namespace detail

namespace detail {

// How weights of some type are packed and met by a tile of rows: in fp32, both.
template <class Element>
struct PanelProduct {
    using Packed = float;
    static int64_t panel_elements(int64_t inputs) { return inputs * panel_width; }
    // Floats of scratch for one tile of rows.
    static int64_t tile_floats(int64_t) { return 0; }

    static void pack(const Matrix& weight, int64_t first, int64_t outputs, float* panel) {
        pack_panel<Element>(weight, first, outputs, panel);
    }

    const float* addresses[tile_rows];

    void read(const float* const* rows, int count, int64_t, float*) {
        for (int r = 0; r < count; ++r) addresses[r] = rows[r];
    }

    template <int panels>
    void multiply(int count, const float* packed, int64_t inputs, const Target& out) const {
        const float* at[2] = {packed, packed + panel_elements(inputs)};
        sums_of_rows<tile_rows, panels>(count, addresses, 1, at, inputs, out);
    }
};

#if RXT_HAS_BFLOAT16_DOT

// A panel of pairs [input / 2][16][2] of a matrix of bfloat16. Pairs of neighbouring inputs are turned as if each were a float.
inline void pack_pairs(const Matrix& weight, int64_t first, int64_t outputs, BFloat16* panel) {
    const auto* source = static_cast<const BFloat16*>(weight.data) + first * weight.output_stride;
    const auto value = [&](int64_t k, int64_t n) {
        return k < weight.inputs && n < outputs ? source[k * weight.input_stride + n * weight.output_stride] : BFloat16{0};
    };
    int64_t k = 0;
    if (outputs == panel_width && weight.output_stride == 1) {
        for (; k + 2 <= weight.inputs; k += 2) {
            const auto half = [&](int64_t i) {
                return _mm512_cvtepu16_epi32(
                    _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source + (k + i) * weight.input_stride)));
            };
            _mm512_storeu_si512(panel + k * panel_width, _mm512_or_si512(half(0), _mm512_slli_epi32(half(1), 16)));
        }
    } else if (outputs == panel_width && weight.output_stride % 2 == 0) {
        for (; k + 2 * panel_width <= weight.inputs; k += 2 * panel_width)
            transpose_square(reinterpret_cast<const float*>(source + k), weight.output_stride / 2,
                             reinterpret_cast<float*>(panel + k * panel_width), panel_width);
    }
    for (; k < weight.inputs; k += 2)
        for (int64_t n = 0; n < panel_width; ++n) {
            panel[(k * panel_width) + 2 * n] = value(k, n);
            panel[(k * panel_width) + 2 * n + 1] = value(k + 1, n);
        }
}

template <>
struct PanelProduct<BFloat16> {
    using Packed = BFloat16;
    static int64_t even(int64_t inputs) { return (inputs + 1) / 2 * 2; }
    static int64_t panel_elements(int64_t inputs) { return even(inputs) * panel_width; }
    static int64_t tile_floats(int64_t inputs) { return tile_rows * even(inputs) / 2; }

    static void pack(const Matrix& weight, int64_t first, int64_t outputs, BFloat16* panel) {
        pack_pairs(weight, first, outputs, panel);
    }

    const BFloat16* addresses[tile_rows];

    void read(const float* const* rows, int count, int64_t inputs, float* scratch) {
        auto* values = reinterpret_cast<BFloat16*>(scratch);
        for (int r = 0; r < count; ++r, values += even(inputs)) {
            round_row_to_bfloat16(rows[r], inputs, values);
            addresses[r] = values;
        }
    }

    template <int panels>
    void multiply(int count, const BFloat16* packed, int64_t inputs, const Target& out) const {
        pairs_of_rows<tile_rows, panels>(count, addresses, 2, packed, panel_elements(inputs), inputs, out);
    }
};

#endif

}  // namespace detail

// Outputs of a matrix that are computed together: outputs[p], a panel's worth or less, from first[p] on. Their sums stand from
// column[p] on. The second panel may have none.
struct PanelPair {
    int64_t first[2], outputs[2], column[2];
};

// epilogue(first row, rows, sums) for all rows, a tile of them after the other: sums (rows, 2 * most_pairs * panel_width) of the pairs
// pair_at(i), i in [0, pairs), whose panels were packed before. row(i) is the address of row i, as long as the matrix has inputs. A sum
// runs over the inputs from first to last, but where a tile has few rows.
template <int most_pairs, class Element, class RowAddress, class PairAt, class Epilogue>
inline void multiply_pairs(const RowAddress& row, int64_t rows, const Matrix& weight, int pairs, const PairAt& pair_at,
                           Epilogue&& epilogue) {
    static_assert(tile_panels <= 2, "a pair is one tile wide, or two");
    using Product = detail::PanelProduct<Element>;
    using Packed = typename Product::Packed;
    constexpr int64_t stride = 2 * most_pairs * panel_width;
    const int64_t inputs = weight.inputs, elements = Product::panel_elements(inputs);
    const int64_t panels_end = 2 * pairs * elements * static_cast<int64_t>(sizeof(Packed)) / static_cast<int64_t>(sizeof(float));
    float* scratch = Scratch::of_task(panels_end + Product::tile_floats(inputs));
    auto* packed = reinterpret_cast<Packed*>(scratch);
    for (int i = 0; i < pairs; ++i) {
        const PanelPair pair = pair_at(i);
        for (int p = 0; p < 2; ++p)
            if (pair.outputs[p] > 0) Product::pack(weight, pair.first[p], pair.outputs[p], packed + (2 * i + p) * elements);
    }
    alignas(64) float sums[tile_rows * stride];
    const int64_t tiles = (rows + tile_rows - 1) / tile_rows;
    for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t first = rows * tile / tiles;
        const int count = static_cast<int>(rows * (tile + 1) / tiles - first);
        const float* addresses[tile_rows];
        for (int r = 0; r < count; ++r) addresses[r] = row(first + r);
        Product product;
        product.read(addresses, count, inputs, scratch + panels_end);
        for (int i = 0; i < pairs; ++i) {
            const PanelPair pair = pair_at(i);
            const Packed* own = packed + 2 * i * elements;
            if (tile_panels == 2 && pair.outputs[1] > 0) {
                product.template multiply<tile_panels>(count, own, inputs,
                                                       {sums + pair.column[0], stride, pair.column[1] - pair.column[0]});
            } else {
                for (int p = 0; p < 2; ++p)
                    if (pair.outputs[p] > 0)
                        product.template multiply<1>(count, own + p * elements, inputs, {sums + pair.column[p], stride, 0});
            }
        }
        epilogue(first, count, sums);
    }
}

namespace detail {

// How rows and columns of an outer product are packed, `inputs` of them one behind the other, and multiplied: in fp32.
template <class Element>
struct OuterProduct {
    using Packed = float;
    static int64_t padded(int64_t inputs) { return inputs; }

    // [tile][input][row]: what a tile of rows needs is one straight line.
    template <class Left>
    static void pack_rows(const Left& left, int64_t inputs, int rows, float* tiles) {
        for (int64_t k = 0; k < inputs; ++k) {
            const auto* source = left(k);
            if (k + rows_ahead < inputs) fetch(left(k + rows_ahead), rows);
            for (int64_t r = 0; r < rows; r += tile_rows)
                for (int64_t i = 0; i < tile_rows && r + i < rows; i += Float::lanes) {
                    const int64_t own = at_most(rows - r - i, tile_rows - i);
                    store_up_to(tiles + r * inputs + k * tile_rows + i, load_up_to(source + r + i, own), own);
                }
        }
    }

    template <class Right>
    static void pack_columns(const Right& right, int64_t inputs, int64_t columns, float* panels) {
        pack_inputs(right, inputs, columns, panels);
    }

    template <int panels>
    static void multiply(const float* tile, int count, const float* packed, int64_t inputs, const Target& out) {
        const float* addresses[tile_rows];
        for (int r = 0; r < count; ++r) addresses[r] = tile + r;
        const float* at[2] = {packed, packed + inputs * panel_width};
        sums_of_rows<tile_rows, panels>(count, addresses, tile_rows, at, inputs, out);
    }
};

#if RXT_HAS_BFLOAT16_DOT

// The same in pairs of inputs, rounded to bfloat16.
template <>
struct OuterProduct<BFloat16> {
    using Packed = BFloat16;
    static int64_t padded(int64_t inputs) { return (inputs + 1) / 2 * 2; }

    // Pairs of up to 16 values of two inputs; the second may be missing.
    static void store_pairs(const float* even, const float* odd, int64_t count, BFloat16* target) {
        const auto half = [&](const float* from) { return _mm512_cvtepu16_epi32(narrow(load_up_to(from, count).value)); };
        __m512i pairs = half(even);
        if (odd != nullptr) pairs = _mm512_or_si512(pairs, _mm512_slli_epi32(half(odd), 16));
        const Float bits{reinterpret_cast<__m512>(pairs)};
        store_up_to(reinterpret_cast<float*>(target), bits, count);
    }

    template <class Left>
    static void pack_rows(const Left& left, int64_t inputs, int rows, BFloat16* tiles) {
        for (int64_t k = 0; k < inputs; k += 2) {
            const float *even = left(k), *odd = k + 1 < inputs ? left(k + 1) : nullptr;
            for (int64_t i = k + rows_ahead; i < k + rows_ahead + 2 && i < inputs; ++i) fetch(left(i), rows);
            for (int64_t r = 0; r < rows; r += tile_rows)
                store_pairs(even + r, odd == nullptr ? nullptr : odd + r, at_most(rows - r, tile_rows),
                            tiles + r * padded(inputs) + k * tile_rows);
        }
    }

    template <class Right>
    static void pack_columns(const Right& right, int64_t inputs, int64_t columns, BFloat16* panels) {
        for (int64_t first = 0; first < columns; first += panel_width, panels += padded(inputs) * panel_width) {
            const int64_t count = at_most(columns - first, panel_width);
            for (int64_t k = 0; k < inputs; k += 2) {
                for (int64_t i = k + rows_ahead; first == 0 && i < k + rows_ahead + 2 && i < inputs; ++i) fetch(right(i), columns);
                store_pairs(right(k) + first, k + 1 < inputs ? right(k + 1) + first : nullptr, count, panels + k * panel_width);
                for (int64_t i = 2 * count; i < 2 * panel_width; ++i) panels[k * panel_width + i] = BFloat16{0};
            }
        }
    }

    template <int panels>
    static void multiply(const BFloat16* tile, int count, const BFloat16* packed, int64_t inputs, const Target& out) {
        const BFloat16* addresses[tile_rows];
        for (int r = 0; r < count; ++r) addresses[r] = tile + 2 * r;
        pairs_of_rows<tile_rows, panels>(count, addresses, 2 * tile_rows, packed, padded(inputs) * panel_width, inputs, out);
    }
};

#endif

}  // namespace detail

// finish(r, sums) for all rows: sums[c] = sum over inputs k of left(k)[r] * right(k)[c], in products of Element.
template <class Element, class Left, class Right, class Finish>
inline void multiply_outer(const Left& left, int rows, const Right& right, int64_t inputs, int64_t columns, Finish&& finish) {
    constexpr int64_t enough_inputs_to_pack = 24, group = 512;
    using Outer = detail::OuterProduct<Element>;
    using Packed = typename Outer::Packed;
    const int64_t stride = padded_columns(columns), most = Outer::padded(detail::at_most(inputs, group));
    const int64_t padded_rows = (rows + tile_rows - 1) / tile_rows * tile_rows;
    float* sums = Scratch::of_task(rows * stride + most * (detail::packed_outputs + padded_rows));
    auto* panels = reinterpret_cast<Packed*>(sums + rows * stride);
    Packed* tiles = panels + most * detail::packed_outputs;
    if (inputs < enough_inputs_to_pack)
        multiply_input_major([&](int r, int64_t k) { return left(k)[r]; }, rows, right, inputs, columns, sums, stride);
    for (int64_t input = 0; input < inputs && inputs >= enough_inputs_to_pack; input += group) {
        const int64_t present = detail::at_most(inputs - input, group);
        Outer::pack_rows([&](int64_t k) { return left(input + k); }, present, rows, tiles);
        for (int64_t column = 0; column < columns; column += detail::packed_outputs) {
            const int64_t outputs = detail::at_most(columns - column, detail::packed_outputs);
            Outer::pack_columns([&](int64_t k) { return right(input + k) + column; }, present, outputs, panels);
            alignas(64) float part[tile_rows * Tile::stride];
            for (int row = 0; row < rows; row += tile_rows) {
                const int count = static_cast<int>(detail::at_most(rows - row, tile_rows));
                float* own = sums + row * stride + column;
                const detail::Target target = input == 0 ? detail::Target{own, stride, panel_width}
                                                         : detail::Target{part, Tile::stride, panel_width};
                const Packed* tile = tiles + row * Outer::padded(present);
                if (tile_panels == 2 && outputs > panel_width) {
                    Outer::template multiply<tile_panels>(tile, count, panels, present, target);
                } else {
                    Outer::template multiply<1>(tile, count, panels, present, target);
                }
                if (input == 0) continue;
                for (int r = 0; r < count; ++r)
                    for (int64_t i = 0; i < outputs; i += Float::lanes)
                        store(own + r * stride + i, load(own + r * stride + i) + load(part + r * Tile::stride + i));
            }
        }
    }
    for (int r = 0; r < rows; ++r) finish(r, sums + r * stride);
}

}  // namespace rxt::RXT_INSTRUCTION_SET

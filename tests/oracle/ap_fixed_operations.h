// What the ap_fixed headers compute, as functions over arrays of raw integers: a raw integer is the bits of a
// fixed-point number, value * 2^(width - int_bits). Every function has one signature, so that Python can call any.

#include <cstdint>

#include "ap_fixed.h"

using Inputs = const int64_t* const*;
using Sizes = const int64_t*;
using Function = void (*)(Inputs, Sizes, int64_t*);

template <int W, int I, bool S, ap_q_mode Q, ap_o_mode O, int N>
int64_t raw(const ap_fixed_base<W, I, S, Q, O, N>& number) {
    ap_int_base<W, S> bits;
    bits.V = number.V;
    return bits.to_int64();
}

template <typename T>
T from_raw(int64_t bits) {
    T number;
    number.V = ap_int_base<64, true>(bits).V;
    return number;
}

// The format of a result whose type the headers choose: width, integer bits, whether signed.
template <int W, int I, bool S, ap_q_mode Q, ap_o_mode O, int N>
int64_t* write_format(const ap_fixed_base<W, I, S, Q, O, N>&, int64_t* out) {
    *out++ = W;
    *out++ = I;
    *out++ = S;
    return out;
}

// sizes: count
template <typename Source, typename Target>
void cast(Inputs inputs, Sizes sizes, int64_t* out) {
    for (int64_t i = 0; i < sizes[0]; i++) {
        Target target = from_raw<Source>(inputs[0][i]);
        out[i] = raw(target);
    }
}

// sizes: count
template <typename Left, typename Right>
void sum(Inputs inputs, Sizes sizes, int64_t* out) {
    out = write_format(Left() + Right(), out);
    for (int64_t i = 0; i < sizes[0]; i++) {
        out[i] = raw(from_raw<Left>(inputs[0][i]) + from_raw<Right>(inputs[1][i]));
    }
}

// sizes: count
template <typename Left, typename Right>
void product(Inputs inputs, Sizes sizes, int64_t* out) {
    out = write_format(Left() * Right(), out);
    for (int64_t i = 0; i < sizes[0]; i++) {
        out[i] = raw(from_raw<Left>(inputs[0][i]) * from_raw<Right>(inputs[1][i]));
    }
}

// sizes: rows, depth, columns. x is rows * depth, w is depth * columns, the bias has one number per column.
// cast_products: hls4ml keeps each product in the accumulator's type before it adds.
template <typename X, typename W, typename Bias, typename Acc, typename Out, bool cast_products>
void dense(Inputs inputs, Sizes sizes, int64_t* out) {
    const int64_t *x = inputs[0], *w = inputs[1], *bias = inputs[2];
    const int64_t rows = sizes[0], depth = sizes[1], columns = sizes[2];
    for (int64_t row = 0; row < rows; row++) {
        for (int64_t column = 0; column < columns; column++) {
            Acc acc = from_raw<Bias>(bias[column]);
            for (int64_t k = 0; k < depth; k++) {
                X left = from_raw<X>(x[row * depth + k]);
                W right = from_raw<W>(w[k * columns + column]);
                if constexpr (cast_products) {
                    Acc one = left * right;
                    acc += one;
                } else {
                    acc += left * right;
                }
            }
            Out result = acc;
            out[row * columns + column] = raw(result);
        }
    }
}

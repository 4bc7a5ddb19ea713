// What every instruction set shares: the order of codes, sums and roundings. With it, results are bit-equal everywhere.
//
// For a token, q are the codes of its input, z their zero point, s their scale. For a row of the weight, c are its codes
// less OFFSET(bits), which is 128 at 8 bits, so that they are signed bytes, else 0. Each group g of columns has
//   S_g = sum (q - z) c      and      X_g = sum (q - z),      exact in 32 bits,
// and adds to the sixteen partial sums a, in the order of the groups,
//   a[g % 16] = fma(scale_g, float(S_g - zero_g X_g), a[g % 16])            zero_g: the zero point less OFFSET
//   a[g % 16] = fma(minimum_g, float(X_g), a[g % 16])                       with minima, whose zero_g is 0
// The result is fma(s, sum of a, bias), the sum by halves: a[i] + a[i + 8], then + 4, + 2, + 1.
//
// Inputs that stay float are integers of 3 or 4 bytes in units of s, about 2^-23 or 2^-31 of the token's largest magnitude.
// Each byte less 128 is a digit, and goes the way of a token of codes; the sums r of the digits, the highest first, make
// r = r * 256 + next, where the product is exact.
#pragma once
#include <cmath>
#include <cstring>
#include <vector>

#include "zsaq_kernels.h"

namespace zsaq {

constexpr int kLanes = 16;   // partial sums
constexpr int kStep = 512;   // columns that a step of a fast kernel takes: 16 groups of 32

inline int offset_of(int bits) { return bits == 8 ? 128 : 0; }

// A token's input, quantized.
struct Token {
  float scale;              // NaN where the input is not finite
  int32_t zero;
  const uint8_t* codes;     // (columns padded to kStep), in the order that the kernel reads; padding is 0
  const int32_t* sums;      // X_g, padded with 0 to a multiple of kLanes
  const float* float_sums;  // the same as float
};

// How a weight is read, worked out once a call.
struct Weight {
  const ZsaqWeight* layer;
  int64_t groups;
  int64_t row_bytes;
  int32_t symmetric_zero;   // of ZSAQ_SYMMETRIC, less OFFSET

  explicit Weight(const ZsaqWeight* l)
      : layer(l),
        groups((l->columns + l->group - 1) / l->group),
        row_bytes((static_cast<int64_t>(l->columns) * l->bits + 7) / 8),
        symmetric_zero((1 << (l->bits - 1)) - offset_of(l->bits)) {}

  const uint8_t* codes(int64_t row) const { return layer->codes + row * row_bytes; }
  int64_t first(int64_t row) const { return layer->one_scale ? 0 : row * groups; }  // its first scale
};

inline float half_to_float(uint16_t h) {
  uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 1023, bits;
  if (exponent == 0) {
    float small = static_cast<float>(mantissa) * 5.9604644775390625e-8f;  // 2^-24
    return sign ? -small : small;
  }
  bits = exponent == 31 ? sign | 0x7f800000u | (mantissa << 13) : sign | ((exponent + 112) << 23) | (mantissa << 13);
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint16_t float_to_half(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  uint32_t sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
  if (magnitude >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // 65520 and above round to infinity
  if (magnitude < 0x38800000) {                                             // below 2^-14: units of 2^-24
    float absolute;
    std::memcpy(&absolute, &magnitude, 4);
    return static_cast<uint16_t>(sign | static_cast<uint32_t>(std::nearbyint(absolute * 16777216.0f)));
  }
  uint32_t rounded = magnitude + 0xfff + ((magnitude >> 13) & 1);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000) >> 13));
}

inline float bfloat_to_float(uint16_t b) {
  uint32_t bits = static_cast<uint32_t>(b) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint16_t float_to_bfloat(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>((bits >> 16) | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float load(const void* values, int64_t i, int32_t type) {
  if (type == ZSAQ_FLOAT32) return static_cast<const float*>(values)[i];
  uint16_t bits = static_cast<const uint16_t*>(values)[i];
  return type == ZSAQ_BFLOAT16 ? bfloat_to_float(bits) : half_to_float(bits);
}

inline void store(void* values, int64_t i, int32_t type, float value) {
  if (type == ZSAQ_FLOAT32)
    static_cast<float*>(values)[i] = value;
  else
    static_cast<uint16_t*>(values)[i] = type == ZSAQ_BFLOAT16 ? float_to_bfloat(value) : float_to_half(value);
}

inline float sum_by_halves(const float* a) {
  float b[8];
  for (int i = 0; i < 8; ++i) b[i] = a[i] + a[i + 8];
  for (int i = 0; i < 4; ++i) b[i] += b[i + 4];
  for (int i = 0; i < 2; ++i) b[i] += b[i + 2];
  return b[0] + b[1];
}

// Rows [from, to) of the weight times all tokens; sums (tokens, to - from) float, before scale and bias.
using RowsFunction = void (*)(const Weight&, const Token*, int64_t tokens, int64_t from, int64_t to, float* sums);

// One token's outputs y[i] = fma(scale, sums[i], bias[i]), rounded to `type`; bias may be null.
using FinishFunction = void (*)(float scale, const float* sums, const float* bias, int64_t count, void* y, int32_t type);

// Codes of one row of inputs, in their natural order; gives scale and zero point in the token.
using QuantizeFunction = void (*)(const ZsaqInput&, int64_t columns, const float* x, uint8_t* codes, Token*);

// The same as digits, one row of them after the other, `padded` apart.
using DigitsFunction = void (*)(int digits, int64_t columns, const float* x, int64_t padded, uint8_t* codes, Token*);

inline int32_t fixed_offset(int digits) { return digits == 4 ? static_cast<int32_t>(0x80808080u) : 0x808080; }
inline float highest_fixed(int digits) { return digits == 4 ? 2139062016.0f : 8355584.0f; }  // a float32 that fits

void portable_finish(float, const float*, const float*, int64_t, void*, int32_t);
void portable_quantize(const ZsaqInput&, int64_t, const float*, uint8_t*, Token*);
void portable_digits(int, int64_t, const float*, int64_t, uint8_t*, Token*);
void avx2_finish(float, const float*, const float*, int64_t, void*, int32_t);
void avx2_quantize(const ZsaqInput&, int64_t, const float*, uint8_t*, Token*);
void avx2_digits(int, int64_t, const float*, int64_t, uint8_t*, Token*);
void avx512_finish(float, const float*, const float*, int64_t, void*, int32_t);
void avx512_quantize(const ZsaqInput&, int64_t, const float*, uint8_t*, Token*);
void avx512_digits(int, int64_t, const float*, int64_t, uint8_t*, Token*);

// What multiplies a weight: an inner loop, and the order of codes that it reads.
struct Kernel {
  RowsFunction rows;
  int64_t at_a_time;      // rows of the weight
  // puts codes in the order that it reads, (columns padded to kStep); null: it reads them as they are
  void (*arrange)(const uint8_t* codes, int64_t padded, uint8_t* out);
};

// An instruction set. `choose` says whether it serves a weight, and how.
struct Isa {
  ZsaqIsa name;
  bool (*runs)();
  bool (*choose)(const Weight&, int64_t tokens, Kernel*);
  QuantizeFunction quantize;
  DigitsFunction digits;
  FinishFunction finish;
};

bool portable_kernel(const Weight&, int64_t tokens, Kernel*);
bool avx2_kernel(const Weight&, int64_t tokens, Kernel*);
bool avx512_kernel(const Weight&, int64_t tokens, Kernel*);
bool avx2_runs();
bool avx512_runs();

}  // namespace zsaq

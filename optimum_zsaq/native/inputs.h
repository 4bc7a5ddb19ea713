// What is done before and after the products, for every instruction set that the compiler writes it for.
#pragma once
#include "layout.h"

#if defined(__GNUC__)
#define ZSAQ_EVERYWHERE __attribute__((always_inline)) inline
#else
#define ZSAQ_EVERYWHERE inline
#endif

namespace zsaq {

ZSAQ_EVERYWHERE void finish_outputs(float scale, const float* sums, const float* bias, int64_t count, void* y, int32_t type) {
  for (int64_t i = 0; i < count; ++i) store(y, i, type, std::fma(scale, sums[i], bias ? bias[i] : 0.0f));
}

ZSAQ_EVERYWHERE void make_digits(int digits, int64_t columns, const float* x, int64_t padded, uint8_t* codes, Token* token) {
  const float highest = highest_fixed(digits);
  float largest = 0.0f;
  bool finite = true;
  for (int64_t i = 0; i < columns; ++i) {
    const float size = std::fabs(x[i]);
    largest = size > largest ? size : largest;
    finite = finite && std::isfinite(x[i]);
  }
  token->zero = 128;
  token->scale = finite ? largest / highest : NAN;
  const float scale = finite && token->scale > 0.0f ? token->scale : 1.0f;
  if (finite) token->scale = scale;
  for (int64_t i = 0; i < columns; ++i) {
    float value = std::nearbyint(finite ? x[i] / scale : 0.0f);
    value = value > highest ? highest : value < -highest ? -highest : value;
    const uint32_t fixed = static_cast<uint32_t>(static_cast<int32_t>(value)) + static_cast<uint32_t>(fixed_offset(digits));
    for (int d = 0; d < digits; ++d) codes[d * padded + i] = static_cast<uint8_t>(fixed >> (8 * (digits - 1 - d)));
  }
}

ZSAQ_EVERYWHERE void make_codes(const ZsaqInput& input, int64_t columns, const float* x, uint8_t* codes, Token* token) {
  const float highest = static_cast<float>(input.highest);
  float low = 0.0f, high = 0.0f, scale = input.scale, zero = static_cast<float>(input.zero);
  if (!input.is_static) {
    bool finite = true;
    for (int64_t i = 0; i < columns; ++i) {
      low = x[i] < low ? x[i] : low;
      high = x[i] > high ? x[i] : high;
      finite = finite && std::isfinite(x[i]);
    }
    scale = (high - low) / highest;
    if (!finite || !std::isfinite(scale)) {
      token->scale = NAN;
      token->zero = 0;
      std::memset(codes, 0, columns);
      return;
    }
    if (scale == 0.0f) scale = 1.0f;
    zero = std::nearbyint(-low / scale);
  }
  for (int64_t i = 0; i < columns; ++i) {
    const float code = std::nearbyint(x[i] / scale) + zero;
    codes[i] = static_cast<uint8_t>(code > 0.0f ? (code < highest ? code : highest) : 0.0f);  // NaN becomes 0
  }
  token->scale = scale;
  token->zero = static_cast<int32_t>(zero);
}

}  // namespace zsaq

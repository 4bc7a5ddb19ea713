// Plain C++: every scheme on every processor, and the order of roundings that the others are compared with.
#include <algorithm>

#include "inputs.h"
#include "layout.h"

namespace zsaq {

namespace {

// Codes of one row less OFFSET, as signed bytes.
void widen(const uint8_t* packed, int bits, int64_t columns, int8_t* out) {
  const int mask = (1 << bits) - 1, offset = offset_of(bits);
  uint32_t word = 0;
  int held = 0;
  for (int64_t i = 0; i < columns; ++i) {
    if (held < bits) {
      word |= static_cast<uint32_t>(*packed++) << held;
      held += 8;
    }
    out[i] = static_cast<int8_t>(static_cast<int>(word & mask) - offset);
    word >>= bits;
    held -= bits;
  }
}

int32_t dot(const uint8_t* q, int32_t zero, const int8_t* c, int64_t count) {
  int32_t products = 0, sum = 0;
  for (int64_t i = 0; i < count; ++i) {
    products += static_cast<int32_t>(q[i]) * c[i];
    sum += c[i];
  }
  return products - zero * sum;
}

void rows_of_any(const Weight& weight, const Token* tokens, int64_t count, int64_t from, int64_t to, float* sums) {
  const ZsaqWeight& layer = *weight.layer;
  std::vector<int8_t> codes(layer.columns);
  for (int64_t row = from; row < to; ++row) {
    widen(weight.codes(row), layer.bits, layer.columns, codes.data());
    const int64_t first = weight.first(row);
    for (int64_t t = 0; t < count; ++t) {
      const Token& token = tokens[t];
      float a[kLanes] = {};
      for (int64_t g = 0; g < weight.groups; ++g) {
        const int64_t start = g * layer.group, size = std::min<int64_t>(layer.group, layer.columns - start);
        int32_t s = dot(token.codes + start, token.zero, codes.data() + start, size);
        float& into = a[g % kLanes];
        if (layer.shift_type == ZSAQ_SYMMETRIC) s -= weight.symmetric_zero * token.sums[g];
        if (layer.shift_type == ZSAQ_ZERO_POINT)
          s -= (static_cast<const uint8_t*>(layer.shift)[first + g] - offset_of(layer.bits)) * token.sums[g];
        const float scale = load(layer.scale, first + g, layer.scale_type);
        into = std::fma(scale, static_cast<float>(s), into);
        if (layer.shift_type == ZSAQ_MINIMUM) {
          // with codes less 128, value = scale * (c + 128) + minimum
          const float minimum = load(layer.shift, first + g, layer.scale_type);
          into = std::fma(layer.bits == 8 ? std::fma(128.0f, scale, minimum) : minimum, token.float_sums[g], into);
        }
      }
      sums[t * (to - from) + row - from] = sum_by_halves(a);
    }
  }
}

}  // namespace

bool portable_kernel(const Weight&, int64_t, Kernel* kernel) {
  *kernel = {rows_of_any, 16, nullptr};
  return true;
}

void portable_finish(float scale, const float* sums, const float* bias, int64_t count, void* y, int32_t type) {
  finish_outputs(scale, sums, bias, count, y, type);
}

void portable_digits(int digits, int64_t columns, const float* x, int64_t padded, uint8_t* codes, Token* token) {
  make_digits(digits, columns, x, padded, codes, token);
}

void portable_quantize(const ZsaqInput& input, int64_t columns, const float* x, uint8_t* codes, Token* token) {
  make_codes(input, columns, x, codes, token);
}

}  // namespace zsaq

// A layer: inputs are quantized, put in the kernel's order, and rows of the weight shared among threads.
#include <algorithm>

#include "layout.h"
#include "threads.h"

namespace zsaq {

namespace {

constexpr int64_t kWorkForAThread = 1 << 18;  // products below which another thread costs more than it takes off

struct Inputs {
  std::vector<float> x, bias;
  std::vector<uint8_t> natural, codes;
  std::vector<int32_t> sums;
  std::vector<float> float_sums;
  std::vector<Token> tokens;
};

const float* as_float(const void* x, int64_t start, int64_t count, int32_t type, std::vector<float>* room) {
  if (type == ZSAQ_FLOAT32) return static_cast<const float*>(x) + start;
  room->resize(count);
  for (int64_t i = 0; i < count; ++i) (*room)[i] = load(x, start + i, type);
  return room->data();
}

// The best first.
const Isa kIsas[] = {
    {ZSAQ_AVX512, avx512_runs, avx512_kernel, avx512_quantize, avx512_digits, avx512_finish},
    {ZSAQ_AVX2, avx2_runs, avx2_kernel, avx2_quantize, avx2_digits, avx2_finish},
    {ZSAQ_PORTABLE, [] { return true; }, portable_kernel, portable_quantize, portable_digits, portable_finish},
};

// The one that is asked for; null where it does not run.
const Isa* find_isa(int32_t wanted) {
  for (const Isa& isa : kIsas)
    if ((wanted == ZSAQ_BEST || wanted == isa.name) && isa.runs()) return &isa;
  return nullptr;
}

void prepare(const Weight& weight, const ZsaqInput& input, const Kernel& kernel, const Isa& isa, const void* x,
             int64_t count, int32_t type, Inputs* in) {
  const ZsaqWeight& layer = *weight.layer;
  const int64_t columns = layer.columns, padded = (columns + kStep - 1) / kStep * kStep;
  const int64_t groups = (weight.groups + kLanes - 1) / kLanes * kLanes, digits = input.digits ? input.digits : 1;
  in->natural.assign(digits * padded, 0);
  in->codes.resize(count * digits * padded);
  in->sums.assign(count * digits * groups, 0);
  in->float_sums.assign(count * digits * groups, 0.0f);
  in->tokens.resize(count * digits);
  for (int64_t t = 0; t < count; ++t) {
    const float* values = as_float(x, t * columns, columns, type, &in->x);
    Token found;
    if (input.digits)
      isa.digits(input.digits, columns, values, padded, in->natural.data(), &found);
    else
      isa.quantize(input, columns, values, in->natural.data(), &found);
    for (int64_t d = 0; d < digits; ++d) {
      Token& token = in->tokens[t * digits + d];
      token = found;
      const uint8_t* natural = in->natural.data() + d * padded;
      uint8_t* codes = in->codes.data() + (t * digits + d) * padded;
      int32_t* sums = in->sums.data() + (t * digits + d) * groups;
      float* float_sums = in->float_sums.data() + (t * digits + d) * groups;
      for (int64_t g = 0; g < weight.groups; ++g) {
        const int64_t start = g * layer.group, stop = std::min<int64_t>(start + layer.group, columns);
        int32_t sum = 0;
        for (int64_t i = start; i < stop; ++i) sum += natural[i];
        sums[g] = sum - token.zero * static_cast<int32_t>(stop - start);
        float_sums[g] = static_cast<float>(sums[g]);
      }
      if (kernel.arrange)
        kernel.arrange(natural, padded, codes);
      else
        std::memcpy(codes, natural, padded);
      token.codes = codes;
      token.sums = sums;
      token.float_sums = float_sums;
    }
  }
}

// The sums of a token's digits, the highest first, as one. In place of the first.
void combine(int64_t digits, int64_t width, float* sums) {
  for (int64_t d = 1; d < digits; ++d)
    for (int64_t i = 0; i < width; ++i) sums[i] = sums[i] * 256.0f + sums[d * width + i];
}

}  // namespace

}  // namespace zsaq

ZSAQ_EXPORT int32_t zsaq_best_isa() { return zsaq::find_isa(ZSAQ_BEST)->name; }

ZSAQ_EXPORT int32_t zsaq_has_isa(int32_t isa) { return zsaq::find_isa(isa) != nullptr; }

ZSAQ_EXPORT int32_t zsaq_linear(const ZsaqWeight* layer, const ZsaqInput* input, const void* x, int64_t tokens_given,
                                const void* bias, int32_t bias_type, void* y, int32_t type, int32_t threads, int32_t isa) {
  using namespace zsaq;
  const Weight weight(layer);
  const Isa* found = find_isa(isa);
  if (!found) return -1;
  Kernel kernel;
  const int64_t digits = input->digits ? input->digits : 1, count = tokens_given * digits;
  if (!found->choose(weight, count, &kernel)) portable_kernel(weight, count, &kernel);
  thread_local Inputs in;
  prepare(weight, *input, kernel, *found, x, tokens_given, type, &in);
  const Token* tokens = in.tokens.data();
  const float* plus = bias ? as_float(bias, 0, layer->rows, bias_type, &in.bias) : nullptr;
  const int64_t size = type == ZSAQ_FLOAT32 ? 4 : 2;
  const int64_t rows = layer->rows, pieces = (rows + kernel.at_a_time - 1) / kernel.at_a_time;
  const int64_t work = rows * layer->columns * count;
  threads = static_cast<int32_t>(std::max<int64_t>(1, std::min<int64_t>({threads, pieces, work / kWorkForAThread})));
  share(threads, pieces, [&](int64_t piece) {
    thread_local std::vector<float> sums;
    const int64_t from = piece * kernel.at_a_time, to = std::min(from + kernel.at_a_time, rows);
    sums.resize((to - from) * count);
    kernel.rows(weight, tokens, count, from, to, sums.data());
    for (int64_t t = 0; t < tokens_given; ++t) {
      float* of_token = sums.data() + t * digits * (to - from);
      combine(digits, to - from, of_token);
      found->finish(tokens[t * digits].scale, of_token, plus ? plus + from : nullptr, to - from,
             static_cast<char*>(y) + (t * rows + from) * size, type);
    }
  });
  return 0;
}

// The interface of the kernels: plain C, no headers of Python or torch.
#pragma once
#include <cstdint>

#if defined(_WIN32)
#define ZSAQ_EXPORT extern "C" __declspec(dllexport)
#else
#define ZSAQ_EXPORT extern "C" __attribute__((visibility("default")))
#endif

enum ZsaqType : int32_t { ZSAQ_FLOAT32 = 0, ZSAQ_BFLOAT16 = 1, ZSAQ_FLOAT16 = 2 };
enum ZsaqShift : int32_t { ZSAQ_SYMMETRIC = 0, ZSAQ_ZERO_POINT = 1, ZSAQ_MINIMUM = 2 };
enum ZsaqIsa : int32_t { ZSAQ_BEST = 0, ZSAQ_PORTABLE = 1, ZSAQ_AVX512 = 2, ZSAQ_AVX2 = 3 };

// One packed weight (rows, columns).
struct ZsaqWeight {
  int32_t bits;          // of a code, 2 to 8
  int32_t rows;
  int32_t columns;       // at most 65536, so that sums fit 32 bits
  int32_t group;         // columns that share a scale; `columns` for one scale a row or a matrix
  int32_t one_scale;     // 1: one scale for the whole matrix
  int32_t shift_type;    // ZsaqShift
  int32_t scale_type;    // ZsaqType of scales and minima: float32 or float16
  const uint8_t* codes;  // (rows, ceil(columns * bits / 8)), as optimum_zsaq/ops/packing.py packs them
  const void* scale;     // (rows, groups), (rows, 1) or (1, 1)
  const void* shift;     // zero points uint8 or minima, in the shape of the scales; null where symmetric
};

// How a layer quantizes its inputs.
struct ZsaqInput {
  int32_t digits;        // 0: inputs become codes; 3 or 4: they stay float, as fixed-point numbers of so many bytes
  int32_t highest;       // the largest code
  int32_t is_static;     // 1: scale and zero point are stored, 0: each token has its own
  int32_t zero;
  float scale;
};

// y (tokens, rows) = inputs as codes times weight, plus bias (rows,) or null; x (tokens, columns) and y are of `type`,
// contiguous. Gives 0, or -1 where this build or processor has not the instruction set that was asked for.
ZSAQ_EXPORT int32_t zsaq_linear(const ZsaqWeight* weight, const ZsaqInput* input, const void* x, int64_t tokens,
                                const void* bias, int32_t bias_type, void* y, int32_t type, int32_t threads, int32_t isa);

// The instruction set that ZSAQ_BEST means on this processor.
ZSAQ_EXPORT int32_t zsaq_best_isa();

// 1 where this build and processor have an instruction set, else 0.
ZSAQ_EXPORT int32_t zsaq_has_isa(int32_t isa);

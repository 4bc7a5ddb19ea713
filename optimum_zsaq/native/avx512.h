// What the kernels for AVX-512 with VNNI and VBMI share.
#pragma once
#include "layout.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#define ZSAQ_AVX512 1
#define ZSAQ_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vnni,avx512bitalg,f16c,fma")))
#define ZSAQ_INLINE ZSAQ_TARGET __attribute__((always_inline)) inline

namespace zsaq {

// One token and long rows: see avx512_row.cpp.
bool avx512_row_kernel(const Weight&, Kernel*);

}  // namespace zsaq

#endif

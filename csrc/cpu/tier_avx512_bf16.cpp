// AVX-512 with bfloat16 dot products (AMD, from Zen 4 on).

#define CKD_TIER avx512_bf16
#define CKD_BFLOAT16
#include "tier.h"

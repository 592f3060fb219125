// AVX2, FMA and F16C.

#define CKD_TIER avx2
#include "tier.h"

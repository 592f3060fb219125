// AVX-512 for float32.

#define CKD_TIER avx512
#include "tier.h"

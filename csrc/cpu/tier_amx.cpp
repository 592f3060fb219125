// AVX-512, and AMX tiles for bfloat16 (Intel, from Sapphire Rapids on).

#define CKD_TIER amx
#define CKD_BFLOAT16
#define CKD_AMX
#include "tier.h"

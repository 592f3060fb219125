// What every processor has: vectors of four, which compilers map to SSE2 or NEON.

#define CKD_TIER portable
#include "tier.h"

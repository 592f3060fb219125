// For every processor: vectors of four lanes, which compilers map to SSE2 or NEON.

#define CKD_TIER portable
#include "tier.h"

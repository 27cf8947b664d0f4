// The CPU kernels for any processor.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "kernels.h"

#define DTR_ISA baseline
#include "kernels.inl"

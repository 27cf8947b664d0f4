// The CPU kernels for any processor.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>
#include <vector>

#include "../surgery.h"
#include "kernels.h"

#define DTR_ISA baseline
#define DTR_VECTOR_BYTES 16
#include "kernels.inl"
#include "surgery.inl"

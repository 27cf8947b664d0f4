#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

struct __half {
    uint16_t bits;
};

inline float __half2float(__half half) {
    const uint32_t sign = (half.bits & 0x8000u) << 16;
    uint32_t bits = (half.bits & 0x7fffu) << 13;
    const bool finite = bits < 0x0f800000u;
    float magnitude;
    std::memcpy(&magnitude, &bits, 4);
    magnitude *= finite ? 0x1p112f : 1;  // the exponents' biases are 127 and 15
    std::memcpy(&bits, &magnitude, 4);
    bits |= sign | (finite ? 0 : 0x7f800000u);
    std::memcpy(&magnitude, &bits, 4);
    return magnitude;
}

inline __half __float2half_rn(float x) {
    const float magnitude = std::fabs(x);
    uint32_t bits;
    std::memcpy(&bits, &magnitude, 4);
    if (std::isnan(x)) return {0x7fff};
    if (magnitude >= 65520) {
        bits = 0x7c00;
    } else if (magnitude < 0x1p-14f) {
        bits = static_cast<uint32_t>(std::nearbyint(magnitude * 0x1p24f));
    } else {
        bits = (bits + 0xfff + (bits >> 13 & 1) - 0x38000000u) >> 13;
    }
    return {static_cast<uint16_t>(bits | (std::signbit(x) ? 0x8000 : 0))};
}

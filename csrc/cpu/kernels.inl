// The kernels of kernels.h, compiled once per instruction set: the including file defines DTR_ISA and the target.

// Declared by hand: clang compiles for OpenMP where its header is not installed.
extern "C" int omp_get_max_threads();
extern "C" int omp_get_thread_num();

namespace dtr {
namespace {

constexpr int64_t kCacheLine = 64;

inline int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// `size` elements for each thread of a parallel region, uninitialised, on cache lines of their own. Made before the
// region: an exception that leaves one ends the process.
template <class T>
class Scratch {
public:
    explicit Scratch(int64_t size, int threads = omp_get_max_threads())
        : lines_each_(divided_up(size * sizeof(T), kCacheLine)), lines_(new Line[lines_each_ * threads]) {}
    T* mine() const { return reinterpret_cast<T*>(&lines_[lines_each_ * omp_get_thread_num()]); }

private:
    struct alignas(kCacheLine) Line {
        char bytes[kCacheLine];
    };
    int64_t lines_each_;
    std::unique_ptr<Line[]> lines_;
};

// Independent partial sums, so that the compiler may use vector registers without reordering additions.
constexpr int64_t kLanes = 32;

inline float from_bf16(uint16_t bits) {
    uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
}

inline uint16_t to_bf16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
    return static_cast<uint16_t>((bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : rounded);
}

inline char* at(const Rows& rows, int64_t row, int64_t column = 0) {
    return static_cast<char*>(rows.data) + (row * rows.stride + column) * size_of(rows.type);
}

template <class T>
const T* vector_at(const Rows& rows, int64_t row) {
    return static_cast<const T*>(rows.data) + row * rows.stride;
}

// Conversions of kHalves fp16 numbers: left to itself GCC 12 converts one at a time. (clang ignores the target pragmas.)
#if DTR_VECTOR_BYTES == 64 && !defined(__clang__)
constexpr int64_t kHalves = 16;
inline void widen(const void* p, float* out) { _mm512_storeu_ps(out, _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(p)))); }
inline void narrow(const float* p, void* out) {
    _mm256_storeu_si256(static_cast<__m256i*>(out), _mm512_cvtps_ph(_mm512_loadu_ps(p), _MM_FROUND_TO_NEAREST_INT));
}
#elif DTR_VECTOR_BYTES == 32 && !defined(__clang__)
constexpr int64_t kHalves = 8;
inline void widen(const void* p, float* out) { _mm256_storeu_ps(out, _mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(p)))); }
inline void narrow(const float* p, void* out) {
    _mm_storeu_si128(static_cast<__m128i*>(out), _mm256_cvtps_ph(_mm256_loadu_ps(p), _MM_FROUND_TO_NEAREST_INT));
}
#else
constexpr int64_t kHalves = 1;
inline void widen(const _Float16* p, float* out) { *out = *p; }
inline void narrow(const float* p, _Float16* out) { *out = static_cast<_Float16>(*p); }
#endif

template <class T>
void from_f16(const _Float16* __restrict p, int64_t n, T* __restrict out) {
    int64_t i = 0;
    if constexpr (std::is_same_v<T, float>)
        for (; i + kHalves <= n; i += kHalves) widen(p + i, out + i);
    for (; i < n; ++i) out[i] = static_cast<float>(p[i]);
}

template <class T>
void to_f16(const T* __restrict row, int64_t n, _Float16* __restrict p) {
    int64_t i = 0;
    if constexpr (std::is_same_v<T, float>)
        for (; i + kHalves <= n; i += kHalves) narrow(row + i, p + i);
    for (; i < n; ++i) p[i] = static_cast<_Float16>(static_cast<float>(row[i]));
}

template <class T>
void load(const void* source, Type type, int64_t n, T* __restrict out) {
    switch (type) {
        case Type::f32: { auto p = static_cast<const float*>(source); for (int64_t i = 0; i < n; ++i) out[i] = p[i]; break; }
        case Type::f64: { auto p = static_cast<const double*>(source); for (int64_t i = 0; i < n; ++i) out[i] = static_cast<T>(p[i]); break; }
        case Type::bf16: { auto p = static_cast<const uint16_t*>(source); for (int64_t i = 0; i < n; ++i) out[i] = from_bf16(p[i]); break; }
        case Type::f16: from_f16(static_cast<const _Float16*>(source), n, out); break;
    }
}

template <class T>
void store(const T* __restrict row, int64_t n, Type type, void* target) {
    switch (type) {
        case Type::f32: { auto p = static_cast<float*>(target); for (int64_t i = 0; i < n; ++i) p[i] = static_cast<float>(row[i]); break; }
        case Type::f64: { auto p = static_cast<double*>(target); for (int64_t i = 0; i < n; ++i) p[i] = row[i]; break; }
        case Type::bf16: { auto p = static_cast<uint16_t*>(target); for (int64_t i = 0; i < n; ++i) p[i] = to_bf16(static_cast<float>(row[i])); break; }
        case Type::f16: to_f16(row, n, static_cast<_Float16*>(target)); break;
    }
}

template <class T>
void load_row(const Rows& rows, int64_t row, int64_t column, int64_t n, T* out) {
    load(at(rows, row, column), rows.type, n, out);
}

template <class T>
void store_row(const T* row, const Rows& rows, int64_t index, int64_t n) {
    store(row, n, rows.type, at(rows, index));
}

// Rounds a row to what a 16-bit tensor would hold.
template <class T>
void round_row(T* row, int64_t n, Type type) {
    if (type == Type::bf16)
        for (int64_t i = 0; i < n; ++i) row[i] = from_bf16(to_bf16(static_cast<float>(row[i])));
    if (type == Type::f16)
        for (int64_t i = 0; i < n; ++i) row[i] = static_cast<float>(static_cast<_Float16>(static_cast<float>(row[i])));
}

// sum of f(i) for i in 0..n-1
template <class T, class F>
T sum(int64_t n, F f) {
    T lanes[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes)
        for (int64_t j = 0; j < kLanes; ++j) lanes[j] += f(i + j);
    for (int64_t j = 0; i < n; ++i, ++j) lanes[j] += f(i);
    for (int64_t half = kLanes / 2; half > 0; half /= 2)
        for (int64_t j = 0; j < half; ++j) lanes[j] += lanes[j + half];
    return lanes[0];
}

// The channels [lo, hi).
struct Range {
    int64_t lo, hi;
    int64_t size() const { return hi - lo; }
};

inline Range window_of(const Shape& s, int64_t b) {
    if (!s.start) return {0, s.C};
    return {s.start[b], s.start[b] + s.width};
}

// The forward and the backward pass both add the residual update here, so that both round it the same way: where the sum
// nearly cancels, a backward pass that saw another last bit would not match the statistics of the forward pass.
template <class T>
void add_update(T* __restrict v, const T* __restrict branch, const T* __restrict gate, int64_t n) {
    for (int64_t i = 0; i < n; ++i) v[i] += gate[i] * branch[i];
}

template <class T>
void keep_only(T* row, const Range& range, int64_t channels) {
    std::fill(row, row + range.lo, T(0));
    std::fill(row + range.hi, row + channels, T(0));
}

// Three ranges of channels: the window, where x counts; `seen`, outside of which the norm sees zeros; `held`, those of u.
template <class T>
void norm_forward(const NormForward& a) {
    const Shape& s = a.shape;
    const Scratch<T> scratch(3 * s.C);
#pragma omp parallel
    {
        T *v = scratch.mine(), *update = v + s.C, *sum_row = update + s.C;
#pragma omp for schedule(static)
        for (int64_t token = 0; token < s.B * s.N; ++token) {
            const int64_t b = token / s.N;
            const Range all{0, s.C}, window = window_of(s, b), seen = a.keep_branch ? all : window, held = a.compact ? window : all;
            if (a.branch.data) {
                const T* gate = vector_at<T>(a.gate, b);
                load_row(a.x, token, 0, s.C, v);
                load_row(a.branch, token, 0, s.C, update);
                if (a.keep_branch) {
                    if (a.stream.data) {
                        std::copy(v, v + s.C, sum_row);
                        add_update(sum_row, update, gate, s.C);
                        store_row(sum_row, a.stream, token, s.C);
                    }
                    keep_only(v, window, s.C);
                    add_update(v, update, gate, s.C);
                } else {
                    add_update(v, update, gate, s.C);
                    if (a.stream.data) store_row(v, a.stream, token, s.C);
                    round_row(v + seen.lo, seen.size(), a.stream_type);
                }
            } else {
                load_row(a.x, token, seen.lo, seen.size(), v + seen.lo);
            }
            const T* x = v + seen.lo;
            const T mean = a.rms ? 0 : sum<T>(seen.size(), [=](int64_t i) { return x[i]; }) / s.C;
            T squares = sum<T>(seen.size(), [=](int64_t i) { return (x[i] - mean) * (x[i] - mean); });
            squares += static_cast<T>(s.C - seen.size()) * mean * mean;
            const T rstd = 1 / std::sqrt(squares / s.C + static_cast<T>(a.eps));
            if (!a.compact) keep_only(v, seen, s.C);
            const T *shift = vector_at<T>(a.shift, b), *scale = vector_at<T>(a.scale, b);
            for (int64_t c = held.lo; c < held.hi; ++c) v[c] = (v[c] - mean) * rstd * (1 + scale[c]) + shift[c];
            store_row(v + held.lo, a.u, token, held.size());
            if (!a.rms) static_cast<T*>(a.mean.data)[token] = mean;
            static_cast<T*>(a.rstd.data)[token] = rstd;
        }
    }
}

template <class T>
void norm_backward(const NormBackward& a) {
    const Shape& s = a.shape;
    const int64_t chunks = divided_up(s.N, s.chunk);
    T* sums = static_cast<T*>(a.sums.data);
    const Scratch<T> scratch(7 * s.C);
#pragma omp parallel
    {
        T *v = scratch.mine(), *branch = v + s.C, *g = branch + s.C, *d = g + s.C;
        T *shift_sum = d + s.C, *scale_sum = shift_sum + s.C, *gate_sum = scale_sum + s.C;
#pragma omp for schedule(static)
        for (int64_t unit = 0; unit < s.B * chunks; ++unit) {
            const int64_t b = unit / chunks, first = (unit % chunks) * s.chunk;
            const Range all{0, s.C}, window = window_of(s, b), seen = a.keep_branch ? all : window, held = a.compact ? window : all;
            const T* gate = a.branch.data ? vector_at<T>(a.gate, b) : nullptr;
            const T* scale = vector_at<T>(a.scale, b);
            std::fill(shift_sum, gate_sum + s.C, T(0));
            for (int64_t token = b * s.N + first; token < b * s.N + std::min(first + s.chunk, s.N); ++token) {
                const T mean = a.rms ? 0 : static_cast<const T*>(a.mean.data)[token];
                const T rstd = static_cast<const T*>(a.rstd.data)[token];
                load_row(a.x, token, window.lo, window.size(), v + window.lo);
                if (!a.compact) keep_only(v, window, s.C);
                if (a.branch.data) {
                    load_row(a.branch, token, 0, s.C, branch);
                    if (!a.x_is_stream) add_update(v + seen.lo, branch + seen.lo, gate + seen.lo, seen.size());
                    if (!a.x_is_stream && !a.keep_branch) round_row(v + seen.lo, seen.size(), a.x.type);
                }
                load_row(a.du, token, 0, held.size(), g + held.lo);
                for (int64_t c = held.lo; c < held.hi; ++c) {
                    v[c] = (v[c] - mean) * rstd;
                    shift_sum[c] += g[c];
                    scale_sum[c] += g[c] * v[c];
                    g[c] *= 1 + scale[c];
                }
                const T *z = v + held.lo, *dz = g + held.lo;
                T total = a.rms ? 0 : sum<T>(held.size(), [=](int64_t i) { return dz[i]; });
                T along = sum<T>(held.size(), [=](int64_t i) { return dz[i] * z[i]; });
                if (a.inactive.data) {
                    const T inactive = static_cast<const T*>(a.inactive.data)[token];
                    total += inactive;
                    along -= mean * rstd * inactive;
                }
                total /= s.C, along /= s.C;
                for (int64_t c = seen.lo; c < seen.hi; ++c) g[c] = rstd * (g[c] - total - v[c] * along);
                if (a.dstream.data) load_row(a.dstream, token, 0, s.C, d);
                else std::fill(d, d + s.C, T(0));
                for (int64_t c = window.lo; c < window.hi; ++c) d[c] += g[c];
                store_row(d, a.dx, token, s.C);
                if (a.branch.data) {
                    for (int64_t c = seen.lo; c < window.lo; ++c) d[c] += g[c];
                    for (int64_t c = window.hi; c < seen.hi; ++c) d[c] += g[c];
                    for (int64_t c = 0; c < s.C; ++c) {
                        gate_sum[c] += d[c] * branch[c];
                        d[c] *= gate[c];
                    }
                    store_row(d, a.dbranch, token, s.C);
                }
            }
            const int64_t plane = s.B * chunks * s.C;
            std::copy(shift_sum, shift_sum + s.C, sums + unit * s.C);
            std::copy(scale_sum, scale_sum + s.C, sums + plane + unit * s.C);
            if (a.branch.data) std::copy(gate_sum, gate_sum + s.C, sums + 2 * plane + unit * s.C);
        }
    }
}

template <class T>
void residual_forward(const ResidualForward& a) {
    const Shape& s = a.shape;
    const Scratch<T> scratch(2 * s.C);
#pragma omp parallel
    {
        T *x = scratch.mine(), *branch = x + s.C;
#pragma omp for schedule(static)
        for (int64_t token = 0; token < s.B * s.N; ++token) {
            const T* gate = vector_at<T>(a.gate, token / s.N);
            load_row(a.x, token, 0, s.C, x);
            load_row(a.branch, token, 0, s.C, branch);
            add_update(x, branch, gate, s.C);
            store_row(x, a.out, token, s.C);
        }
    }
}

template <class T>
void residual_backward(const ResidualBackward& a) {
    const Shape& s = a.shape;
    const int64_t chunks = divided_up(s.N, s.chunk);
    const Scratch<T> scratch(3 * s.C);
#pragma omp parallel
    {
        T *d = scratch.mine(), *branch = d + s.C, *gate_sum = branch + s.C;
#pragma omp for schedule(static)
        for (int64_t unit = 0; unit < s.B * chunks; ++unit) {
            const int64_t b = unit / chunks, first = (unit % chunks) * s.chunk;
            const T* gate = vector_at<T>(a.gate, b);
            std::fill(gate_sum, gate_sum + s.C, T(0));
            for (int64_t token = b * s.N + first; token < b * s.N + std::min(first + s.chunk, s.N); ++token) {
                load_row(a.dout, token, 0, s.C, d);
                load_row(a.branch, token, 0, s.C, branch);
                for (int64_t c = 0; c < s.C; ++c) {
                    gate_sum[c] += d[c] * branch[c];
                    d[c] *= gate[c];
                }
                store_row(d, a.dbranch, token, s.C);
            }
            std::copy(gate_sum, gate_sum + s.C, static_cast<T*>(a.sums.data) + unit * s.C);
        }
    }
}

// Both are bounded where the other factor of e * gate would already be zero, so that no infinity meets it.
inline double exponential(double x) { return std::exp(x > 700 ? 700 : x); }

// exp to about one ulp, branch-free so that it vectorises: x = n ln 2 + r, exp(x) = 2^n exp(r) with |r| <= ln 2 / 2.
inline float exponential(float x) {
    x = x > 88.0f ? 88.0f : x;
    x = x < -87.0f ? -87.0f : x;
    const float shifted = x * 1.44269504f + 12582912.0f;  // adding 1.5 * 2^23 rounds to an integer
    const float n = shifted - 12582912.0f;
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.0f / 5040;
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = (p * r) * r + r + 1.0f;
    uint32_t bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    bits = (bits + 127) << 23;  // the low bits of `shifted` are n
    float power;
    std::memcpy(&power, &bits, sizeof power);
    return p * power;
}

// Every activation is x * gate(x), see activations.py.
template <class T> constexpr T kLinear = static_cast<T>(1.5957691216057308);
template <class T> constexpr T kCubic = static_cast<T>(0.07135481627260025);
template <class T> constexpr T kSqrtHalf = static_cast<T>(0.7071067811865476);
template <class T> constexpr T kDensity = static_cast<T>(0.3989422804014327);

inline double normal_share(double x, double) { return 0.5 * std::erfc(-x * kSqrtHalf<double>); }

// The normal distribution to 1e-7 (Abramowitz and Stegun 7.1.26), branch-free; e = exp(-x^2 / 2).
inline float normal_share(float x, float e) {
    const float t = 1 / (1 + 0.3275911f * kSqrtHalf<float> * std::abs(x));
    const float p = ((((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t + 0.254829592f) * t;
    const float tail = 0.5f * p * e;
    return x < 0 ? tail : 1 - tail;
}

// `rest` is what the slope is made of beside the gate: 1 - gate, without its cancellation, and of gelu the density.
template <class T>
void gate_row(Activation kind, const T* __restrict x, T* __restrict gate, T* __restrict rest, int64_t n) {
    if (kind == Activation::gelu) {
        for (int64_t i = 0; i < n; ++i) {
            const T e = exponential(T(-0.5) * x[i] * x[i]);
            gate[i] = normal_share(x[i], e);
            rest[i] = kDensity<T> * e;
        }
        return;
    }
    const bool tanh = kind == Activation::gelu_tanh;
    const T linear = tanh ? kLinear<T> : T(1), cubic = tanh ? kCubic<T> : T(0);
    for (int64_t i = 0; i < n; ++i) {
        const T e = exponential(-x[i] * (linear + cubic * x[i] * x[i]));
        gate[i] = 1 / (1 + e);
        rest[i] = e * gate[i];
    }
}

// g becomes the gradient times the slope, gate + x gate (1 - gate) (linear + 3 cubic x^2), or gate + x density. A loop of
// its own: with the gate computed in it, GCC 12 splits the clamps of the exponential into paths and the loop runs 7 times
// slower.
template <class T>
void slope_row(Activation kind, const T* __restrict x, const T* __restrict gate, const T* __restrict rest, T* __restrict g, int64_t n) {
    if (kind == Activation::gelu) {
        for (int64_t i = 0; i < n; ++i) g[i] *= gate[i] + x[i] * rest[i];
        return;
    }
    const bool tanh = kind == Activation::gelu_tanh;
    const T linear = tanh ? kLinear<T> : T(1), cubic = tanh ? kCubic<T> : T(0);
    for (int64_t i = 0; i < n; ++i) {
        const T y = std::min(std::max(x[i], T(-10)), T(10));  // beyond, the slope is 0 or 1, and the square may be huge
        g[i] *= gate[i] + x[i] * gate[i] * rest[i] * (linear + 3 * cubic * y * y);
    }
}

template <class T>
void multiply(T* __restrict row, const T* __restrict by, int64_t n) {
    for (int64_t i = 0; i < n; ++i) row[i] *= by[i];
}

template <class T>
void activation(const ActivationPass& a) {
    constexpr int64_t kBlock = 2048;
    const bool gated = a.kind == Activation::swiglu;
    const int64_t blocks = divided_up(a.width, kBlock);
    const Scratch<T> scratch(6 * kBlock);
#pragma omp parallel
    {
        T *x = scratch.mine(), *gate = x + kBlock, *rest = gate + kBlock, *g = rest + kBlock, *b = g + kBlock, *db = b + kBlock;
#pragma omp for schedule(static)
        for (int64_t unit = 0; unit < a.rows * blocks; ++unit) {
            const int64_t row = unit / blocks, first = unit % blocks * kBlock, n = std::min(kBlock, a.width - first);
            load_row(a.pre, row, first, n, x);
            if (gated) load_row(a.pre, row, a.width + first, n, b);
            gate_row(a.kind, x, gate, rest, n);
            if (a.dact.data) {
                load_row(a.dact, row, first, n, g);
                if (gated) {
                    for (int64_t i = 0; i < n; ++i) db[i] = g[i] * x[i] * gate[i];
                    store(db, n, a.dpre.type, at(a.dpre, row, a.width + first));
                }
                slope_row(a.kind, x, gate, rest, g, n);
                if (gated) multiply(g, b, n);
                store(g, n, a.dpre.type, at(a.dpre, row, first));
            }
            multiply(x, gate, n);
            if (gated) multiply(x, b, n);
            store(x, n, a.act.type, at(a.act, row, first));
        }
    }
}

// fp64 input computes in double, everything else in float.
#define DTR_DISPATCH(name, Args, leading)                                       \
    void name##_any(const Args& a) {                                            \
        if (a.leading.type == Type::f64) name<double>(a); else name<float>(a);  \
    }
DTR_DISPATCH(norm_forward, NormForward, x)
DTR_DISPATCH(norm_backward, NormBackward, x)
DTR_DISPATCH(residual_forward, ResidualForward, x)
DTR_DISPATCH(residual_backward, ResidualBackward, dout)
DTR_DISPATCH(activation, ActivationPass, pre)
#undef DTR_DISPATCH

}  // namespace

#define DTR_PASTE(a, b) a##b
#define DTR_TABLE(isa) DTR_PASTE(isa, _kernels)
#define DTR_QUOTE(x) #x
#define DTR_NAME(x) DTR_QUOTE(x)
extern const Kernels DTR_TABLE(DTR_ISA);
const Kernels DTR_TABLE(DTR_ISA) = {
    DTR_NAME(DTR_ISA), norm_forward_any, norm_backward_any, residual_forward_any, residual_backward_any, activation_any,
};

}  // namespace dtr

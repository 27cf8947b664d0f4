// The kernels of surgery.h, compiled once per instruction set after kernels.inl, whose load and store they use; the
// including file also defines DTR_VECTOR_BYTES.
//
// To them the segments of a gradient are one row of P columns. Panels of columns are widened to fp32 in a buffer that stays
// in cache, whatever segments they come from: many tiny segments are as good as one huge one, results do not depend on
// where the cuts are, and a panel may be overwritten in place once it is read. While the processor computes on a panel,
// it fetches a later one.

namespace dtr {
namespace {

constexpr int64_t kWidth = DTR_VECTOR_BYTES / sizeof(float);
using Floats = float __attribute__((vector_size(DTR_VECTOR_BYTES)));
using Doubles = double __attribute__((vector_size(DTR_VECTOR_BYTES)));  // half as many lanes
constexpr int64_t kHalf = kWidth / 2;

// Sums held in registers: kTile x kTile vectors of products for the Gram matrix, kRows x kVectors of a combination.
constexpr int64_t kTile = DTR_VECTOR_BYTES == 64 ? 5 : 3;
constexpr int64_t kRows = 6, kVectors = DTR_VECTOR_BYTES == 64 ? 4 : 2;

// Columns of a panel.
constexpr int64_t kColumns = 512;
// Products that a lane adds in fp32: 32 roundings, an error of at most 2e-6 |g_i| |g_j| for any data. Over many panels they
// average out: 1e-10 for random gradients of 33 million elements.
constexpr int64_t kStretch = 32;
// A chunk of panels has one partial Gram matrix: chunks are long enough to hide its cost, and few enough to hold them all.
constexpr int64_t kLeastPanels = 16, kMostChunks = 512;
// Bytes between what is read and what is fetched at least; what is nearer would arrive too late.
constexpr int64_t kLeastAhead = 8192;

// f(integral constant n) for an n in 1..most.
template <int most, class F>
void with_constant(int64_t n, F f) {
    if constexpr (most > 0) {
        if (n == most) f(std::integral_constant<int, most>());
        else with_constant<most - 1>(n, f);
    }
}

// 0..size-1 in parts of nearly one size.
class Parts {
public:
    Parts(int64_t size, int64_t count) : count_(count) {
        for (int64_t part = 0; part <= count; ++part) begins_.push_back(size * part / count);
    }
    int64_t count() const { return count_; }
    int64_t begin(int64_t part) const { return begins_[part]; }
    int64_t size(int64_t part) const { return begins_[part + 1] - begins_[part]; }

private:
    int64_t count_;
    std::vector<int64_t> begins_;
};

// Rows of a later panel.
struct Ahead {
    const char* const* rows;
    int64_t count;
    int64_t stride;  // bytes from vector to vector

    void fetch(int64_t vector) const {
        if (vector * stride % kCacheLine == 0)
            for (int64_t k = 0; k < count; ++k) __builtin_prefetch(rows[k] + vector * stride, 0, 2);
    }

    // Only the rows of one part.
    Ahead part(const Parts& parts, int64_t part) const {
        return count ? Ahead{rows + parts.begin(part), parts.size(part), stride} : *this;
    }
};

class Panels {
public:
    explicit Panels(const Gradients& g)
        : g_(g), first_(g.segments + 1), ahead_(divided_up(kLeastAhead, g.K * kColumns * size_of(g.type))) {
        for (int64_t s = 0; s < g.segments; ++s) first_[s + 1] = first_[s] + g.sizes[s];
    }

    int64_t count() const { return divided_up(first_.back(), kColumns); }
    int64_t width(int64_t panel) const { return std::min(kColumns, first_.back() - panel * kColumns); }
    int64_t vectors(int64_t panel) const { return divided_up(width(panel), kWidth); }

    // Calls f(segment, its first column, columns, their first in the panel) for every piece of a panel.
    template <class F>
    void pieces(int64_t panel, F f) const {
        const int64_t begin = panel * kColumns, end = begin + width(panel);
        for (int64_t column = begin, s = segment(begin); column < end; ++s) {
            const int64_t n = std::min(end, first_[s + 1]) - column;
            if (n > 0) f(s, column - first_[s], n, column - begin);
            column += n;
        }
    }

    // Widens a panel to rows [K, kColumns], with zeros up to a whole vector.
    void read(int64_t panel, float* rows) const {
        pieces(panel, [&](int64_t s, int64_t column, int64_t n, int64_t offset) {
            for (int64_t k = 0; k < g_.K; ++k)
                load(element(g_.data[s * g_.K + k], column), g_.type, n, rows + k * kColumns + offset);
        });
        for (int64_t k = 0; k < g_.K; ++k)
            std::fill(rows + k * kColumns + width(panel), rows + k * kColumns + vectors(panel) * kWidth, 0.0f);
    }

    // The rows to prefetch while `panel` is computed. Only their start is looked up: behind short segments the wrong
    // memory is fetched, which does no harm.
    Ahead after(int64_t panel, const char** rows) const {
        const int64_t later = panel + ahead_;
        if (later >= count()) return {rows, 0, 0};
        const int64_t s = segment(later * kColumns);
        for (int64_t k = 0; k < g_.K; ++k) rows[k] = element(g_.data[s * g_.K + k], later * kColumns - first_[s]);
        return {rows, g_.K, kWidth * size_of(g_.type)};
    }

    char* element(void* segment, int64_t column) const { return static_cast<char*>(segment) + column * size_of(g_.type); }

private:
    int64_t segment(int64_t column) const {
        return std::upper_bound(first_.begin(), first_.end(), column) - first_.begin() - 1;
    }

    const Gradients& g_;
    std::vector<int64_t> first_;
    int64_t ahead_;  // panels between what is read and what is fetched
};

inline const Floats& vector_at(const float* row, int64_t v) { return *reinterpret_cast<const Floats*>(row + v * kWidth); }
inline Floats& vector_at(float* row, int64_t v) { return *reinterpret_cast<Floats*>(row + v * kWidth); }

// sums[pair, :] += products of row i of a and row j of b, as kHalf partial sums, for the pairs of i < R and j < C in turn (on
// the diagonal those with i <= j). Not inlined: inside of a larger function GCC 12 keeps the products in memory.
template <int R, int C, bool diagonal>
__attribute__((noinline)) void add_products(const float* a, const float* b, int64_t vectors, double* sums, Ahead ahead) {
    for (int64_t begin = 0; begin < vectors; begin += kStretch) {
        Floats products[R][C] = {};
        for (int64_t v = begin; v < std::min(begin + kStretch, vectors); ++v) {
            ahead.fetch(v);
            Floats x[R];
#pragma GCC unroll 8
            for (int i = 0; i < R; ++i) x[i] = vector_at(a + i * kColumns, v);
#pragma GCC unroll 8
            for (int j = 0; j < C; ++j) {
                const Floats y = diagonal ? x[j] : vector_at(b + j * kColumns, v);
#pragma GCC unroll 8
                for (int i = 0; i < (diagonal ? j + 1 : R); ++i) products[i][j] += x[i] * y;
            }
        }
        alignas(kCacheLine) float pairs[R * C * kWidth];
        int64_t count = 0;
#pragma GCC unroll 8
        for (int i = 0; i < R; ++i)
#pragma GCC unroll 8
            for (int j = diagonal ? i : 0; j < C; ++j) vector_at(pairs, count++) = products[i][j];
        for (int64_t pair = 0; pair < count; ++pair) {
            const float* lanes = pairs + pair * kWidth;
            Doubles low, high;
            for (int64_t lane = 0; lane < kHalf; ++lane) low[lane] = lanes[lane];
            for (int64_t lane = 0; lane < kHalf; ++lane) high[lane] = lanes[kHalf + lane];
            reinterpret_cast<Doubles*>(sums)[pair] += low + high;
        }
    }
}

// The upper triangle of the Gram matrix in tiles, in the order in which `sums` holds them.
class Tiles {
public:
    explicit Tiles(int64_t K)
        : parts_(K, divided_up(K, kTile)), fetches_(K, parts_.count() * (parts_.count() + 1) / 2) {}

    // f(first row, rows, first column, columns) for each tile
    template <class F>
    void for_each(F f) const {
        for (int64_t p = 0; p < parts_.count(); ++p)
            for (int64_t q = p; q < parts_.count(); ++q) f(parts_.begin(p), parts_.size(p), parts_.begin(q), parts_.size(q));
    }

    // Adds the products of a panel to sums [pairs, kHalf].
    void add(const float* rows, int64_t vectors, double* sums, const Ahead& ahead) const {
        int64_t tile = 0;
        for_each([&](int64_t i, int64_t R, int64_t j, int64_t C) {
            const float *a = rows + i * kColumns, *b = rows + j * kColumns;
            const Ahead fetched = ahead.part(fetches_, tile++);
            with_constant<kTile>(R, [&](auto r) {
                if (i == j) add_products<r, r, true>(a, a, vectors, sums, fetched);
                else with_constant<kTile>(C, [&](auto c) { add_products<r, c, false>(a, b, vectors, sums, fetched); });
            });
            sums += (i == j ? R * (R + 1) / 2 : R * C) * kHalf;
        });
    }

private:
    Parts parts_, fetches_;
};

void gram(const Gradients& g, double* out) {
    const Panels panels(g);
    const Tiles tiles(g.K);
    const int64_t pairs = g.K * (g.K + 1) / 2;
    const int64_t chunk_size = std::max(kLeastPanels, divided_up(panels.count(), kMostChunks));
    const int64_t chunks = divided_up(panels.count(), chunk_size);
    std::vector<double> partial(chunks * pairs);
    const int threads = chunks > 1 ? omp_get_max_threads() : 1;
    const Scratch<float> all_rows(g.K * kColumns, threads);
    const Scratch<double> all_sums(pairs * kHalf, threads);
#pragma omp parallel num_threads(threads)
    {
        float* rows = all_rows.mine();
        double* sums = all_sums.mine();
        const char* later[kMaxClusters];
#pragma omp for schedule(static)
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
            std::fill(sums, sums + pairs * kHalf, 0.0);
            for (int64_t panel = chunk * chunk_size; panel < std::min((chunk + 1) * chunk_size, panels.count()); ++panel) {
                panels.read(panel, rows);
                tiles.add(rows, panels.vectors(panel), sums, panels.after(panel, later));
            }
            for (int64_t pair = 0; pair < pairs; ++pair)
                for (int64_t lane = 0; lane < kHalf; ++lane) partial[chunk * pairs + pair] += sums[pair * kHalf + lane];
        }
    }
    std::vector<double> total(pairs);
    for (int64_t chunk = 0; chunk < chunks; ++chunk)
        for (int64_t pair = 0; pair < pairs; ++pair) total[pair] += partial[chunk * pairs + pair];
    const double* product = total.data();
    tiles.for_each([&](int64_t row, int64_t R, int64_t column, int64_t C) {
        for (int64_t i = row; i < row + R; ++i)
            for (int64_t j = std::max(i, column); j < column + C; ++j) out[i * g.K + j] = out[j * g.K + i] = *product++;
    });
}

// out[i, :] = sum over j of coefficients[i, j] rows[j, :], for R rows.
template <int R>
void combine_rows(const float* rows, int64_t K, int64_t vectors, const float* coefficients, float* out, Ahead ahead) {
    for (int64_t begin = 0; begin < vectors; begin += kVectors) {
        for (int64_t v = 0; v < kVectors; ++v) ahead.fetch(begin + v);
        Floats total[R][kVectors] = {};
        for (int64_t j = 0; j < K; ++j) {
            Floats row[kVectors];
#pragma GCC unroll 8
            for (int v = 0; v < kVectors; ++v) row[v] = vector_at(rows + j * kColumns, begin + v);
#pragma GCC unroll 8
            for (int i = 0; i < R; ++i)
#pragma GCC unroll 8
                for (int v = 0; v < kVectors; ++v) total[i][v] += coefficients[i * K + j] * row[v];
        }
#pragma GCC unroll 8
        for (int i = 0; i < R; ++i)
#pragma GCC unroll 8
            for (int v = 0; v < kVectors; ++v) vector_at(out + i * kColumns, begin + v) = total[i][v];
    }
}

// Segment s of row i of coefficients [N, K] times the gradients goes to out[s * N + i], which may be the gradients' own memory.
void combine_to(const Gradients& g, int64_t N, const double* matrix, void* const* out) {
    const Panels panels(g);
    const Parts parts(N, divided_up(N, kRows)), fetches(g.K, parts.count());
    const std::vector<float> coefficients(matrix, matrix + N * g.K);
    const int threads = panels.count() > 1 ? omp_get_max_threads() : 1;
    const Scratch<float> scratch((g.K + kRows) * kColumns, threads);
#pragma omp parallel num_threads(threads)
    {
        float *rows = scratch.mine(), *combined = rows + g.K * kColumns;
        const char* later[kMaxClusters];
#pragma omp for schedule(static)
        for (int64_t panel = 0; panel < panels.count(); ++panel) {
            panels.read(panel, rows);
            const Ahead ahead = panels.after(panel, later);
            for (int64_t part = 0; part < parts.count(); ++part) {
                const int64_t first = parts.begin(part), R = parts.size(part);
                with_constant<kRows>(R, [&](auto r) {
                    combine_rows<r>(rows, g.K, panels.vectors(panel), &coefficients[first * g.K], combined,
                                    ahead.part(fetches, part));
                });
                panels.pieces(panel, [&](int64_t s, int64_t column, int64_t n, int64_t offset) {
                    for (int64_t i = 0; i < R; ++i)
                        store(combined + i * kColumns + offset, n, g.type, panels.element(out[s * N + first + i], column));
                });
            }
        }
    }
}

void combine(const Gradients& g, const double* coefficients) { combine_to(g, g.K, coefficients, g.data); }

void weighted_sum(const Gradients& g, const double* weights, void* const* out) {
    for (int64_t s = 0; s < g.segments; ++s) prefer_huge_pages(out[s], g.sizes[s] * size_of(g.type));
    combine_to(g, 1, weights, out);
}

}  // namespace

#define DTR_SURGERY_TABLE(isa) DTR_PASTE(isa, _surgery)
const SurgeryKernels DTR_SURGERY_TABLE(DTR_ISA) = {gram, combine, weighted_sum};

}  // namespace dtr

// The requirements of the extension's arguments, a table for each entry point. Before a kernel runs, a mistake that
// addresses, sizes, strides and dtypes show throws std::invalid_argument (ValueError in Python). The size of the memory
// behind an address cannot be checked here; the callers' tensors hold it.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cpu/kernels.h"
#include "surgery.h"

namespace dtr {

// Each thread widens up to 7 rows at a time in a buffer of its own: at most 1 GiB.
constexpr int64_t kMostChannels = 1 << 24;
constexpr int64_t kMostTokensInASum = 1 << 30;
constexpr int64_t kMostElements = int64_t{1} << 50;  // so that no product of sizes overflows

[[noreturn]] inline void refuse(const std::string& why) { throw std::invalid_argument(why); }

inline void check_range(const char* name, int64_t value, int64_t least, int64_t most) {
    if (value < least || value > most)
        refuse(std::string(name) + " must be " + std::to_string(least) + " to " + std::to_string(most) + ", got " +
               std::to_string(value));
}

inline const char* name_of(Type type) {
    switch (type) {
        case Type::f32: return "f32";
        case Type::f64: return "f64";
        case Type::bf16: return "bf16";
        case Type::f16: return "f16";
    }
    return nullptr;
}

// Python can make a Type of any number.
inline std::string described(Type type) {
    return name_of(type) ? name_of(type) : "Type(" + std::to_string(static_cast<int>(type)) + ")";
}

inline void check_type(const char* name, Type type) {
    if (!name_of(type)) refuse(std::string(name) + " must be f32, f64, bf16 or f16, got " + described(type));
}

// The memory of one argument, from its first byte to its last.
struct Span {
    uintptr_t begin, end;
    const char* name;
    int64_t index;  // in the list `name`; -1 where it is no list

    std::string described() const {
        char range[64];
        std::snprintf(range, sizeof range, " (0x%zx to 0x%zx)", begin, end);
        return full_name() + range;
    }
    std::string full_name() const { return index < 0 ? name : name + ("[" + std::to_string(index) + "]"); }
};

// `rows` (1 or more) times `columns` (1 or more) elements of `size` bytes; `stride` elements, 0 or more, from row to row.
inline Span span(const char* name, const void* data, int64_t size, int64_t rows, int64_t columns, int64_t stride, int64_t index = -1) {
    Span out{reinterpret_cast<uintptr_t>(data), 0, name, index};
    if (!data) refuse(out.full_name() + " must not be null");
    if (out.begin % size)
        refuse(out.full_name() + " must be at a multiple of " + std::to_string(size) + " bytes, got " + std::to_string(out.begin));
    int64_t bytes, end;
    if (__builtin_mul_overflow(rows - 1, stride, &bytes) || __builtin_add_overflow(bytes, columns, &bytes) ||
        __builtin_mul_overflow(bytes, size, &bytes) || __builtin_add_overflow(out.begin, bytes, &end))
        refuse(out.full_name() + " must end within the address space, got " + std::to_string(rows) + " rows of " + std::to_string(columns) +
               " elements, " + std::to_string(stride) + " apart, at " + std::to_string(out.begin));
    out.end = static_cast<uintptr_t>(end);
    return out;
}

// Kernels may read the same memory twice, but what they write must not overlap anything else. Gaps between rows count as
// part of an argument.
class Memory {
public:
    void reads(const Span& span) { read_.push_back(span); }
    void writes(const Span& span) { written_.push_back(span); }
    void reads(const std::vector<Span>& spans) { read_.insert(read_.end(), spans.begin(), spans.end()); }
    void writes(const std::vector<Span>& spans) { written_.insert(written_.end(), spans.begin(), spans.end()); }

    void refuse_overlaps() {
        std::sort(written_.begin(), written_.end(), [](const Span& a, const Span& b) { return a.begin < b.begin; });
        for (size_t i = 1; i < written_.size(); ++i)
            if (written_[i].begin < written_[i - 1].end) refuse_both(written_[i - 1], written_[i]);
        for (const Span& read : read_) {
            if (written_.empty() || read.end <= written_.front().begin || written_.back().end <= read.begin) continue;
            const auto written = std::partition_point(written_.begin(), written_.end(), [&](const Span& w) { return w.end <= read.begin; });
            if (written != written_.end() && written->begin < read.end) refuse_both(*written, read);
        }
    }

private:
    [[noreturn]] static void refuse_both(const Span& written, const Span& other) {
        refuse(written.described() + ", which is written, must not overlap " + other.described());
    }

    std::vector<Span> read_, written_;
};

// --- kernels of token rows -------------------------------------------------------------------------------------------

// The windows are looked at in every call: they may have changed since the shape was made.
inline void check(const Shape& s) {
    check_range("C", s.C, 1, kMostChannels);
    check_range("B", s.B, 0, kMostElements / s.C);
    check_range("N", s.N, 0, kMostElements / s.C / std::max<int64_t>(s.B, 1));
    check_range("width", s.width, 1, s.C);
    check_range("chunk", s.chunk, 1, kMostTokensInASum);
    if (!s.start || !s.B) return;
    span("start", s.start, sizeof *s.start, 1, s.B, 0);
    for (int64_t b = 0; b < s.B; ++b)
        if (s.start[b] < 0 || s.start[b] > s.C - s.width)
            refuse("window.start must be in 0.." + std::to_string(s.C - s.width) + " (channels - width), got " +
                   std::to_string(s.start[b]) + " for sample " + std::to_string(b));
}

// The rows of a table: each says whether a kernel reads or writes an argument, and what the argument holds. Only for
// shapes with tokens.
class Table {
public:
    // `leading`, the type of the tensor of that name, chooses the compute type.
    Table(const Shape& shape, const char* name, Type leading) : s_(shape), compute_(leading == Type::f64 ? Type::f64 : Type::f32) {
        check_type(name, leading);
        if (s_.start) memory_.reads(span("start", s_.start, sizeof *s_.start, 1, s_.B, 0));
    }

    // [B, N, columns] of any type, rows any distance apart.
    void reads_tokens(const char* name, const Rows& x, int64_t columns) { memory_.reads(rows(name, x, s_.B * s_.N, columns)); }
    void writes_tokens(const char* name, const Rows& x, int64_t columns) {
        if (s_.B * s_.N > 1 && x.stride < columns)
            refuse(std::string(name) + ".stride must be " + std::to_string(columns) + " or more for rows that are written, got " +
                   std::to_string(x.stride));
        memory_.writes(rows(name, x, s_.B * s_.N, columns));
    }
    // [B, C] in the compute type, rows any distance apart.
    void reads_vectors(const char* name, const Rows& x) {
        check_computed(name, x);
        memory_.reads(rows(name, x, s_.B, s_.C));
    }
    // [B, N] in the compute type, contiguous.
    void reads_statistics(const char* name, const Rows& x) { memory_.reads(contiguous(name, x, s_.B, s_.N)); }
    void writes_statistics(const char* name, const Rows& x) { memory_.writes(contiguous(name, x, s_.B, s_.N)); }
    // [planes, B, chunks, C] in the compute type, contiguous.
    void writes_sums(const char* name, const Rows& x, int64_t planes) {
        memory_.writes(contiguous(name, x, planes * s_.B * ((s_.N + s_.chunk - 1) / s_.chunk), s_.C));
    }
    // For a kernel that has no use for the argument.
    void absent(const char* name, const Rows& x, const char* when) {
        if (x.data) refuse(std::string(name) + " must be null " + when);
    }
    void refuse_overlaps() { memory_.refuse_overlaps(); }

private:
    static Span rows(const char* name, const Rows& x, int64_t count, int64_t columns) {
        check_type(name, x.type);
        if (x.stride < 0) refuse(std::string(name) + ".stride must not be negative, got " + std::to_string(x.stride));
        return span(name, x.data, size_of(x.type), count, columns, x.stride);
    }
    Span contiguous(const char* name, const Rows& x, int64_t count, int64_t columns) const {
        check_computed(name, x);
        if (x.stride != columns)
            refuse(std::string(name) + " must be contiguous, with stride " + std::to_string(columns) + ", got " + std::to_string(x.stride));
        return rows(name, x, count, columns);
    }
    void check_computed(const char* name, const Rows& x) const {
        if (x.type != compute_) refuse(std::string(name) + " must be " + name_of(compute_) + " here, got " + described(x.type));
    }

    const Shape& s_;
    Type compute_;
    Memory memory_;
};

// How norm_forward and norm_backward mask.
template <class Args>
void check_masking(const Args& a) {
    if (a.compact && !a.shape.start) refuse("compact must be false without start");
    if (a.compact && a.keep_branch) refuse("compact must be false with keep_branch");
    if (a.keep_branch && !a.branch.data) refuse("keep_branch must be false without branch");
}

inline void check(const NormForward& a) {
    const Shape& s = a.shape;
    Table table(s, "x", a.x.type);
    table.reads_tokens("x", a.x, s.C);
    if (a.branch.data) {
        table.reads_tokens("branch", a.branch, s.C);
        table.reads_vectors("gate", a.gate);
        if (a.stream.data) table.writes_tokens("stream", a.stream, s.C);
    } else {
        table.absent("stream", a.stream, "without branch");
    }
    check_masking(a);
    table.writes_tokens("u", a.u, a.compact ? s.width : s.C);
    table.reads_vectors("shift", a.shift);
    table.reads_vectors("scale", a.scale);
    if (a.rms) table.absent("mean", a.mean, "with rms");
    else table.writes_statistics("mean", a.mean);
    table.writes_statistics("rstd", a.rstd);
    check_type("stream_type", a.stream_type);
    if (!(a.eps >= 0 && std::isfinite(a.eps))) refuse("eps must be finite and not negative, got " + std::to_string(a.eps));
    table.refuse_overlaps();
}

inline void check(const NormBackward& a) {
    const Shape& s = a.shape;
    Table table(s, "x", a.x.type);
    check_masking(a);
    table.reads_tokens("du", a.du, a.compact ? s.width : s.C);
    if (a.dstream.data) table.reads_tokens("dstream", a.dstream, s.C);
    table.reads_tokens("x", a.x, s.C);
    table.writes_tokens("dx", a.dx, s.C);
    if (a.branch.data) {
        table.reads_tokens("branch", a.branch, s.C);
        table.writes_tokens("dbranch", a.dbranch, s.C);
        table.reads_vectors("gate", a.gate);
    } else {
        table.absent("dbranch", a.dbranch, "without branch");
    }
    table.reads_vectors("scale", a.scale);
    if (a.rms) table.absent("mean", a.mean, "with rms");
    else table.reads_statistics("mean", a.mean);
    table.reads_statistics("rstd", a.rstd);
    if (a.compact && !a.rms) table.reads_statistics("inactive", a.inactive);
    else table.absent("inactive", a.inactive, "without compact, and with rms");
    table.writes_sums("sums", a.sums, a.branch.data ? 3 : 2);
    if (a.keep_branch && a.x_is_stream) refuse("x_is_stream must be false with keep_branch");
    table.refuse_overlaps();
}

inline void check(const ResidualForward& a) {
    const Shape& s = a.shape;
    Table table(s, "x", a.x.type);
    table.reads_tokens("x", a.x, s.C);
    table.reads_tokens("branch", a.branch, s.C);
    table.writes_tokens("out", a.out, s.C);
    table.reads_vectors("gate", a.gate);
    table.refuse_overlaps();
}

inline void check(const ResidualBackward& a) {
    const Shape& s = a.shape;
    Table table(s, "dout", a.dout.type);
    table.reads_tokens("dout", a.dout, s.C);
    table.reads_tokens("branch", a.branch, s.C);
    table.writes_tokens("dbranch", a.dbranch, s.C);
    table.reads_vectors("gate", a.gate);
    table.writes_sums("sums", a.sums, 1);
    table.refuse_overlaps();
}

inline Activation activation_named(const std::string& name) {
    if (name == "gelu_tanh") return Activation::gelu_tanh;
    if (name == "gelu") return Activation::gelu;
    if (name == "silu") return Activation::silu;
    if (name == "swiglu") return Activation::swiglu;
    refuse("kind must be gelu_tanh, gelu, silu or swiglu, got " + name);
}

// act may be pre itself, and dpre may be dact, but not of swiglu, where they have other sizes.
inline void check(const ActivationPass& a) {
    Memory memory;
    const bool gated = a.kind == Activation::swiglu;
    const auto rows = [&](const char* name, const Rows& x, int64_t columns) {
        check_type(name, x.type);
        if (x.stride != columns && a.rows > 1)
            refuse(std::string(name) + " must be contiguous, with stride " + std::to_string(columns) + ", got " + std::to_string(x.stride));
        return span(name, x.data, size_of(x.type), a.rows, columns, columns);
    };
    const auto same = [=](const Rows& x, const Rows& y) { return !gated && x.data == y.data && x.type == y.type; };
    const int64_t before = gated ? 2 * a.width : a.width;
    const Span pre = rows("pre", a.pre, before);
    memory.writes(rows("act", a.act, a.width));
    if (!same(a.act, a.pre)) memory.reads(pre);
    if (a.dact.data || a.dpre.data) {
        const Span dact = rows("dact", a.dact, a.width);
        memory.writes(rows("dpre", a.dpre, before));
        if (!same(a.dpre, a.dact)) memory.reads(dact);
    }
    memory.refuse_overlaps();
}

// Checks the sizes and says whether there is anything to compute; without, addresses are of no interest.
inline bool has_work(const ActivationPass& a) {
    check_range("width", a.width, 0, kMostElements);
    check_range("rows", a.rows, 0, kMostElements / std::max<int64_t>(a.width, 1));
    return a.rows > 0 && a.width > 0;
}
template <class Args>
bool has_work(const Args& a) {
    check(a.shape);
    return a.shape.B > 0 && a.shape.N > 0;
}

// --- gradient surgery ------------------------------------------------------------------------------------------------

inline void check_clusters(int64_t clusters) { check_range("clusters", clusters, 1, kMaxClusters); }

// fp64 [rows, columns], or int64.
inline Span matrix(const char* name, const void* data, int64_t rows, int64_t columns) {
    return span(name, data, 8, 1, rows * columns, 0);
}

// Gradients, with the arrays that they point to.
class OwnedGradients {
public:
    OwnedGradients(Type type, int64_t clusters, const std::vector<uintptr_t>& pointers, std::vector<int64_t> sizes)
        : type_(type), K_(clusters), sizes_(std::move(sizes)) {
        if (type == Type::f64 || !name_of(type)) refuse("type must be f32, bf16 or f16, got " + described(type));
        check_clusters(K_);
        int64_t left = kMostElements;
        for (int64_t size : sizes_) {
            if (size < 0) refuse("sizes must not be negative, got " + std::to_string(size));
            if (size > left) refuse("sizes must add up to " + std::to_string(kMostElements) + " or less, got one of " + std::to_string(size));
            left -= size;
        }
        if (pointers.size() != K_ * sizes_.size())
            refuse("pointers must hold clusters * len(sizes) = " + std::to_string(K_ * sizes_.size()) + " addresses, got " +
                   std::to_string(pointers.size()));
        data_ = addresses("pointers", pointers, K_, spans_);
    }

    const std::vector<int64_t>& sizes() const { return sizes_; }
    Gradients view() const { return {type_, K_, static_cast<int64_t>(sizes_.size()), data_.data(), sizes_.data()}; }

    // Checks of a call's other arguments. A workspace of 0 doubles is none.
    void check_gram(const double* out, const double* workspace = nullptr, int64_t doubles = 0) const {
        Memory memory;
        memory.reads(spans_);
        memory.writes(matrix("out", out, K_, K_));
        if (doubles) memory.writes(matrix("workspace", workspace, doubles, 1));
        memory.refuse_overlaps();
    }
    void check_combine(const double* coefficients) const {
        Memory memory;
        memory.writes(spans_);
        memory.reads(matrix("coefficients", coefficients, K_, K_));
        memory.refuse_overlaps();
    }
    // Where the sum goes: one address for each segment.
    std::vector<void*> check_weighted_sum(const double* weights, const std::vector<uintptr_t>& out_pointers) const {
        if (out_pointers.size() != sizes_.size())
            refuse("out_pointers must hold " + std::to_string(sizes_.size()) + " addresses, one for each segment, got " +
                   std::to_string(out_pointers.size()));
        std::vector<Span> spans;
        std::vector<void*> out = addresses("out_pointers", out_pointers, 1, spans);
        Memory memory;
        memory.reads(spans_);
        memory.reads(matrix("weights", weights, K_, 1));
        memory.writes(spans);
        memory.refuse_overlaps();
        return out;
    }

private:
    // `each` addresses for every segment, of which those with elements must be good.
    std::vector<void*> addresses(const char* name, const std::vector<uintptr_t>& pointers, int64_t each, std::vector<Span>& spans) const {
        std::vector<void*> out;
        out.reserve(pointers.size());
        spans.reserve(pointers.size());
        for (uintptr_t pointer : pointers) out.push_back(reinterpret_cast<void*>(pointer));
        for (size_t s = 0, i = 0; s < sizes_.size(); ++s)
            for (int64_t k = 0; k < each; ++k, ++i)
                if (sizes_[s]) spans.push_back(span(name, out[i], size_of(type_), 1, sizes_[s], 0, static_cast<int64_t>(i)));
        return out;
    }

    Type type_;
    int64_t K_;
    std::vector<int64_t> sizes_;
    std::vector<void*> data_;
    std::vector<Span> spans_;  // of those that have elements
};

inline void check_pcgrad(int64_t clusters, const double* gram, const int64_t* order, const double* out) {
    check_clusters(clusters);
    Memory memory;
    memory.reads(matrix("gram", gram, clusters, clusters));
    if (clusters > 1) memory.reads(matrix("order", order, clusters, clusters - 1));
    memory.writes(matrix("out", out, clusters, clusters));
    memory.refuse_overlaps();
}

}  // namespace dtr

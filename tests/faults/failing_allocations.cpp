// To be preloaded: one allocation fails, of those that the extension or PyTorch's allocator of tensors asks for.
#include <dlfcn.h>
#include <errno.h>
#include <link.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

namespace {

std::atomic<long> left{-1};  // allocations until the one that fails; negative after it
struct {
    uintptr_t begin, end;
} callers[8];  // where their code is
int count = 0;

int add_caller(dl_phdr_info* library, size_t, void*) {
    const char* file = std::strrchr(library->dlpi_name, '/');
    if (!file || (std::strncmp(file, "/_C.", 4) != 0 && std::strcmp(file, "/libc10.so") != 0)) return 0;
    for (int i = 0; i < library->dlpi_phnum; ++i) {
        const auto& part = library->dlpi_phdr[i];
        if (part.p_type != PT_LOAD || !(part.p_flags & PF_X) || count == 8) continue;
        const uintptr_t begin = library->dlpi_addr + part.p_vaddr;
        callers[count++] = {begin, begin + part.p_memsz};
    }
    return 0;
}

bool fails(const void* caller) {
    if (left < 0) return false;
    for (int i = 0; i < count; ++i)
        if (callers[i].begin <= uintptr_t(caller) && uintptr_t(caller) < callers[i].end) return left.fetch_sub(1) == 0;
    return false;
}

void* allocated(std::size_t size, std::size_t alignment, const void* caller) {
    void* memory = fails(caller) ? nullptr : std::aligned_alloc(alignment, (size + alignment - 1) / alignment * alignment);
    if (!memory) throw std::bad_alloc();
    return memory;
}

}  // namespace

extern "C" void fail_after(long allocations) {
    left = -1;
    count = 0;
    dl_iterate_phdr(add_caller, nullptr);
    left = allocations;
}
extern "C" long allocations_left() { return left; }

extern "C" int posix_memalign(void** out, std::size_t alignment, std::size_t size) {
    using Function = int(void**, std::size_t, std::size_t);
    static const auto original = reinterpret_cast<Function*>(dlsym(RTLD_NEXT, "posix_memalign"));
    return fails(__builtin_return_address(0)) ? ENOMEM : original(out, alignment, size);
}

constexpr std::size_t kUsual = alignof(std::max_align_t);
void* operator new(std::size_t size) { return allocated(size, kUsual, __builtin_return_address(0)); }
void* operator new[](std::size_t size) { return allocated(size, kUsual, __builtin_return_address(0)); }
void* operator new(std::size_t size, std::align_val_t alignment) {
    return allocated(size, std::size_t(alignment), __builtin_return_address(0));
}
void* operator new[](std::size_t size, std::align_val_t alignment) {
    return allocated(size, std::size_t(alignment), __builtin_return_address(0));
}

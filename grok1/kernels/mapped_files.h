// Files that are used as memory: their pages are read before they are needed, and one that shrinks
// ends the process with a sentence.

#ifndef KERNELS_MAPPED_FILES_H_
#define KERNELS_MAPPED_FILES_H_

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <vector>

#ifdef __linux__
#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>
#endif

namespace {

// An array in a file. layers: into which its bytes are divided, one after the other, or 0. kept: how
// many of them stay in memory after use. always: whether each step needs all of a layer. file: a
// descriptor; the array begins at `offset`.
struct MappedFile {
  std::atomic<const char*> begin;  // null: forgotten
  int64_t bytes, layers, kept, offset;
  bool always;
  int file;
  const char* path;
};

// Bytes of such a file.
struct FilePiece {
  const char* from;
  int64_t bytes;
};

constexpr int64_t kMostFiles = 1024;
MappedFile mapped_files[kMostFiles];  // without locks, for the signal handler
std::atomic<int64_t> mapped_count{0};

// Returns the file that holds an address, or null.
inline const MappedFile* FileOf(const void* address) {
  auto* own = static_cast<const char*>(address);
  for (int64_t n = 0; n < mapped_count.load(std::memory_order_acquire); ++n) {
    const char* begin = mapped_files[n].begin.load(std::memory_order_relaxed);
    if (begin && begin <= own && own < begin + mapped_files[n].bytes) return &mapped_files[n];
  }
  return nullptr;
}

#ifdef __linux__

constexpr int64_t kMost = 4 << 20;  // bytes of a piece
constexpr int64_t kAsked = 128 << 10;  // bytes that are asked for at a time: Linux reads no more
constexpr int64_t kPage = 4096;

// Adds the pieces of an array from `from` on, if it is in a file.
inline void AddPieces(const void* from, int64_t bytes, std::vector<FilePiece>* pieces) {
  if (!FileOf(from)) return;
  auto* first = static_cast<const char*>(from);
  for (int64_t i = 0; i < bytes; i += kMost) {
    pieces->push_back({first + i, std::min(kMost, bytes - i)});
  }
}

// Whether a piece has to be read: whether the byte in its middle has to be.
inline bool IsMissing(const FilePiece& piece) {
  const MappedFile* file = FileOf(piece.from);
  char byte;
  iovec one{&byte, 1};
  int64_t middle = piece.from + piece.bytes / 2 - file->begin.load();
  return preadv2(file->file, &one, 1, file->offset + middle, RWF_NOWAIT) != 1;
}

// Adds what is always needed of the layer that follows a layer; after the last one, the first.
inline void AddPiecesAfter(int64_t layer, int64_t layers, std::vector<FilePiece>* pieces) {
  for (int64_t n = 0; n < mapped_count.load(std::memory_order_acquire); ++n) {
    const MappedFile& file = mapped_files[n];
    const char* begin = file.begin.load();
    if (!begin || !file.always || file.layers != layers) continue;
    int64_t each = file.bytes / layers;
    AddPieces(begin + (layer + 1) % layers * each, each, pieces);
  }
}

// Asks for a piece; returns when it has been requested from the disk.
inline void Ask(const FilePiece& piece) {
  for (int64_t n = 0; n < piece.bytes; n += kAsked) {
    auto begin = reinterpret_cast<intptr_t>(piece.from + n) / kPage * kPage;
    auto end = reinterpret_cast<intptr_t>(piece.from + std::min(n + kAsked, piece.bytes));
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_WILLNEED);
  }
}

// Frees the memory of a piece that has been used, unless its layer stays in memory. If memory cannot
// hold all layers, Linux would free those that have not been used for the longest time, which are
// the next ones, so that all would be read again for each token.
inline void Drop(const FilePiece& piece) {
  const MappedFile* file = FileOf(piece.from);
  if (!file || file->layers == 0) return;
  int64_t at = piece.from - file->begin.load();
  if (at / (file->bytes / file->layers) < file->kept) return;
  auto begin = (reinterpret_cast<intptr_t>(piece.from) + kPage - 1) / kPage * kPage;
  auto end = reinterpret_cast<intptr_t>(piece.from + piece.bytes) / kPage * kPage;
  if (begin >= end) return;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);  // unmaps it: it is a file
  int64_t first = file->offset + (reinterpret_cast<const char*>(begin) - file->begin.load());
  posix_fadvise(file->file, first, end - begin, POSIX_FADV_DONTNEED);
}

struct sigaction before_bus;  // the handler that was there

// Ends the process if a page of a mapped file cannot be read; otherwise does what was done before.
inline void OnBusError(int number, siginfo_t* info, void* context) {
  static std::atomic<long> first{0};
  const MappedFile* file = FileOf(info->si_addr);
  long none = 0, self = syscall(SYS_gettid);
  if (file && !first.compare_exchange_strong(none, self)) {
    while (first != self) pause();  // another thread ends the process
    signal(SIGBUS, SIG_DFL);  // the earlier handler has returned
    return;
  }
  if (file) {
    iovec parts[3];
    const char* text[3] = {"\nerror: ", file->path,
                           ": expected a file that stays as it is while it is used as memory, got "
                           "one that became shorter or cannot be read; start again when nothing "
                           "writes to it, or convert it again\n"};
    for (int n = 0; n < 3; ++n) parts[n] = {const_cast<char*>(text[n]), std::strlen(text[n])};
    if (writev(2, parts, 3) < 0) _exit(1);
  }
  bool own = before_bus.sa_handler != SIG_DFL && before_bus.sa_handler != SIG_IGN;
  if (own && (before_bus.sa_flags & SA_SIGINFO)) {
    before_bus.sa_sigaction(number, info, context);
  } else if (own) {
    before_bus.sa_handler(number);
  } else if (file) {
    _exit(1);
  } else {
    sigaction(SIGBUS, &before_bus, nullptr);  // the instruction is repeated, and ends the process
  }
}

inline void HandleBusErrors() {
  static bool handled = false;
  if (handled) return;
  handled = true;
  struct sigaction own = {};
  own.sa_sigaction = OnBusError;
  own.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigaction(SIGBUS, &own, &before_bus);
}

#else

inline void AddPieces(const void*, int64_t, std::vector<FilePiece>*) {}
inline bool IsMissing(const FilePiece&) { return false; }
inline void AddPiecesAfter(int64_t, int64_t, std::vector<FilePiece>*) {}
inline void Ask(const FilePiece&) {}
inline void Drop(const FilePiece&) {}
inline void HandleBusErrors() {}

#endif

}  // namespace

// Makes an array known that is in a file; `file` and `path` must stay valid. Returns false if there
// are too many. Not thread-safe, except against the functions above.
extern "C" bool WatchFile(const void* begin, int64_t bytes, int64_t layers, int64_t kept,
                          int64_t offset, bool always, int file, const char* path) {
  int64_t n = 0, count = mapped_count.load();
  while (n < count && mapped_files[n].begin.load()) ++n;
  if (n == kMostFiles) return false;
  HandleBusErrors();
  MappedFile& own = mapped_files[n];
  own.bytes = bytes, own.layers = layers, own.kept = kept, own.offset = offset;
  own.always = always, own.file = file, own.path = path;
  own.begin = static_cast<const char*>(begin);
  mapped_count.store(std::max(n + 1, count), std::memory_order_release);
  return true;
}

// Forgets an array whose file is no longer used as memory.
extern "C" void ForgetFile(const void* begin) {
  for (int64_t n = 0; n < mapped_count.load(); ++n) {
    if (mapped_files[n].begin == begin) mapped_files[n].begin = nullptr;
  }
}

#endif  // KERNELS_MAPPED_FILES_H_

// Work shared among the caller and a pool of threads, made when they are first asked for.
#pragma once
#include <cstdint>
#include <functional>

namespace zsaq {

// Calls work(0), ..., work(pieces - 1), each once, on up to `threads` threads, and returns when all are done. One caller at
// a time has the pool; others work alone.
void share(int32_t threads, int64_t pieces, const std::function<void(int64_t)>& work);

}  // namespace zsaq

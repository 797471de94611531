// Includes the file that TILES names, once for each instruction set, in a namespace of its own. Included in the namespace
// of an operator's file, so it has no guard.
namespace plain {
#include TILES
}  // namespace plain

#ifdef VECTORS
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
#include TILES
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512vl")
namespace avx512 {
#include TILES
}  // namespace avx512
#pragma GCC pop_options
#endif

// Launching a kernel on a GPU or on the SIMT device, and the switch from a tensor's dtype to a type.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>
#include <type_traits>

#if defined(__CUDACC__)
#include <cooperative_groups.h>
#endif

#include "device.h"
#include "kernels.h"

namespace fastnets {

struct Grid {
  const char* name;  // in errors, and the SIMT device's counters
  dim3 grid, block;
  Stream stream;
  size_t shared = 0;  // bytes of dynamic shared memory
  bool cooperative = false;
};

#if FASTNETS_SIMT

// The shared memory in bytes that one block may have.
inline size_t shared_limit() { return simt::shared_limit(); }

// The blocks that a grid's x takes.
inline int64_t grid_limit() { return simt::grid_limit(); }

// How many blocks it takes to occupy the device.
inline int multiprocessors() { return static_cast<int>(simt::multiprocessors()); }

// How many blocks of so many threads and so much shared memory a cooperative launch of the kernel may have; 0 where
// the device takes none.
inline int resident_blocks(const void*, int, size_t) { return static_cast<int>(simt::resident_limit()); }

template <class... Parameters>
void launch(const Grid& grid, void (*kernel)(Parameters...), std::type_identity_t<Parameters>... arguments) {
  auto thread = [&] { kernel(arguments...); };
  simt::run(
      {grid.name, grid.grid, grid.block, grid.shared, grid.cooperative, reinterpret_cast<const void*>(kernel)},
      [](void* context) { (*static_cast<decltype(thread)*>(context))(); }, &thread);
}

#else

inline void check_cuda(cudaError_t error, const char* name) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(name) + ": " + cudaGetErrorString(error));
}

inline int64_t grid_limit() { return 0x7fffffff; }

inline size_t shared_limit() {
  int device, bytes;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  check_cuda(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "cudaDeviceGetAttribute");
  return bytes;
}

inline int multiprocessors() {
  int device, count;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  return count;
}

// Lets the kernel have so much shared memory; fails where the device has less.
inline void allow_shared(const void* function, size_t bytes, const char* name) {
  constexpr size_t kWithoutAsking = 48 << 10;
  if (bytes <= kWithoutAsking) return;
  check_cuda(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), name);
}

inline int resident_blocks(const void* function, int threads, size_t shared) {
  int device, cooperative, each;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  check_cuda(cudaDeviceGetAttribute(&cooperative, cudaDevAttrCooperativeLaunch, device), "cudaDeviceGetAttribute");
  if (!cooperative) return 0;
  allow_shared(function, shared, "resident_blocks");
  check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, function, threads, shared), "resident_blocks");
  return each * multiprocessors();
}

template <class... Parameters>
void launch(const Grid& grid, void (*kernel)(Parameters...), std::type_identity_t<Parameters>... arguments) {
  const void* const function = reinterpret_cast<const void*>(kernel);
  allow_shared(function, grid.shared, grid.name);
  void* pointers[] = {&arguments...};
  const cudaStream_t stream = static_cast<cudaStream_t>(grid.stream);
  check_cuda(grid.cooperative
                 ? cudaLaunchCooperativeKernel(function, grid.grid, grid.block, pointers, grid.shared, stream)
                 : cudaLaunchKernel(function, grid.grid, grid.block, pointers, grid.shared, stream),
             grid.name);
}

#endif

// Waits for every thread of the grid, which must have been launched cooperatively, and orders memory between them.
__device__ __forceinline__ void grid_barrier(FASTNETS_HERE) {
#if FASTNETS_SIMT
  simt::grid_barrier(at);
#else
  cooperative_groups::this_grid().sync();
#endif
}

// As many blocks as there are pieces of work, up to what a grid's x takes; kernels go on in strides of the grid.
inline unsigned blocks_for(int64_t pieces) { return static_cast<unsigned>(std::min(pieces, grid_limit())); }

// Calls f with a value of the type that the dtype's elements are stored in.
template <class F>
void with_storage(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::kFloat32: return f(float{});
    case Dtype::kBFloat16: return f(BFloat16{});
    case Dtype::kFloat16: return f(Float16{});
    default: throw std::invalid_argument("the CUDA kernels take float32, bfloat16 and float16");
  }
}

}  // namespace fastnets

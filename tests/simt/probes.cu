// One tiny kernel, of one warp, around each wrapper of tensor_core.h. tests/test_tensor_core.py runs them on the SIMT
// device and executes the PTX that nvcc makes of them. Each takes words of input and of output, and puts its lane's at
// lane * count.
#include "../../csrc/cuda/tensor_core.h"

using namespace fastnets;

#define PROBE extern "C" __attribute__((visibility("default"))) __global__ void

#define MMA_PROBE(name, wrapper)                                                     \
  PROBE name(const uint32_t* in, uint32_t* out) {                                    \
    const uint32_t* const own = in + threadIdx.x * 10;                               \
    const uint32_t a[4] = {own[0], own[1], own[2], own[3]}, b[2] = {own[4], own[5]}; \
    float d[4];                                                                      \
    for (int i = 0; i < 4; ++i) d[i] = __uint_as_float(own[6 + i]);                  \
    wrapper(d, a, b);                                                                \
    for (int i = 0; i < 4; ++i) out[threadIdx.x * 4 + i] = __float_as_uint(d[i]);    \
  }
MMA_PROBE(probe_mma_bf16, mma_bf16)
MMA_PROBE(probe_mma_fp16, mma_fp16)
MMA_PROBE(probe_mma_tf32, mma_tf32)

// in: 1024 bytes for shared memory, then each lane's row.
#define MATRIX_PROBE(name, count, transposed)                                          \
  PROBE name(const uint32_t* in, uint32_t* out) {                                      \
    SHARED_ARRAY(uint32_t, memory, 256);                                               \
    for (int i = 0; i < 8; ++i) memory[threadIdx.x * 8 + i] = in[threadIdx.x * 8 + i]; \
    __syncthreads();                                                                   \
    uint32_t r[count];                                                                 \
    load_matrix<transposed>(r, &memory[0] + in[256 + threadIdx.x] * 4);                \
    for (int i = 0; i < count; ++i) out[threadIdx.x * count + i] = r[i];               \
  }
MATRIX_PROBE(probe_matrix_1, 1, false)
MATRIX_PROBE(probe_matrix_2, 2, false)
MATRIX_PROBE(probe_matrix_4, 4, false)
MATRIX_PROBE(probe_matrix_1_transposed, 1, true)
MATRIX_PROBE(probe_matrix_2_transposed, 2, true)
MATRIX_PROBE(probe_matrix_4_transposed, 4, true)

// in: 32 rows of 16 bytes, then how many bytes of a lane's row are valid. Two copies in two groups: first the one that
// is waited for, and read before the second has arrived.
#define COPY_PROBE(name, bytes)                                                                   \
  PROBE name(const uint32_t* in, uint32_t* out) {                                                 \
    SHARED_ARRAY(uint32_t, memory, 256);                                                          \
    for (int i = 0; i < 8; ++i) memory[threadIdx.x * 8 + i] = 7;                                  \
    copy_async<bytes>(&memory[0] + threadIdx.x * 8, in + threadIdx.x * 4, in[128 + threadIdx.x]); \
    copy_async_commit();                                                                          \
    copy_async<bytes>(&memory[0] + threadIdx.x * 8 + 4, in + threadIdx.x * 4);                    \
    copy_async_commit();                                                                          \
    copy_async_wait<1>();                                                                         \
    for (int i = 0; i < 8; ++i) out[threadIdx.x * 16 + i] = memory[threadIdx.x * 8 + i];          \
    copy_async_wait<0>();                                                                         \
    for (int i = 0; i < 8; ++i) out[threadIdx.x * 16 + 8 + i] = memory[threadIdx.x * 8 + i];      \
  }
COPY_PROBE(probe_copy_4, 4)
COPY_PROBE(probe_copy_8, 8)
COPY_PROBE(probe_copy_16, 16)

PROBE probe_copy_wait_all(const uint32_t* in, uint32_t* out) {
  SHARED_ARRAY(uint32_t, memory, 128);
  copy_async<16>(&memory[0] + threadIdx.x * 4, in + threadIdx.x * 4);
  copy_async_wait_all();
  for (int i = 0; i < 4; ++i) out[threadIdx.x * 4 + i] = memory[threadIdx.x * 4 + i];
}

PROBE probe_named_barrier(const uint32_t* in, uint32_t* out) {
  SHARED_ARRAY(uint32_t, memory, 32);
  memory[threadIdx.x] = in[threadIdx.x];
  named_barrier(3, 32);
  out[threadIdx.x] = memory[31 - threadIdx.x];
}

PROBE probe_flags(const uint32_t* in, uint32_t* out) {
  store_release(out + threadIdx.x, load_acquire(in + threadIdx.x));
}

#define FLOAT_PROBE(name, expression)                                                                   \
  PROBE name(const uint32_t* in, uint32_t* out) {                                                       \
    const float x = __uint_as_float(in[threadIdx.x * 2]), y = __uint_as_float(in[threadIdx.x * 2 + 1]); \
    (void)y;                                                                                            \
    out[threadIdx.x] = expression;                                                                      \
  }
FLOAT_PROBE(probe_tf32, to_tf32(x))
FLOAT_PROBE(probe_pack_bf16, pack<BFloat16>(x, y))
FLOAT_PROBE(probe_pack_fp16, pack<Float16>(x, y))
FLOAT_PROBE(probe_exp2, __float_as_uint(exp2_approx(x)))

#if FASTNETS_SIMT

struct Call {
  void (*probe)(const uint32_t*, uint32_t*);
  const uint32_t* in;
  uint32_t* out;
};

extern "C" __attribute__((visibility("default"))) void run_probe(Call call) {
  const auto thread = [](void* p) {
    const Call& call = *static_cast<const Call*>(p);
    call.probe(call.in, call.out);
  };
  simt::run({"probe", 1, 32}, thread, &call);
}

#endif

// Products of tiles for tests/test_tile.py: csrc/cuda/tile.h on the SIMT device.
#include "../../csrc/cuda/tile.h"

#include <map>

#include "../../csrc/cuda/launch.h"

using namespace fastnets;

namespace {

constexpr int kSize = 32, kInner = 64;  // of the tiles: m and n, and the depth

struct Parameters {
  const void *a, *b, *after;  // a [m, k] or [k, m], b [n, k] or [k, n], after [n, n]
  float* d;                   // [32, 32]: a b
  float* e;                   // [32, 32]: a b after
  void* kept;                 // [32, 32]: a b, rounded to the storage
  int m, n, k, pitch;         // rows and columns that exist; elements between rows, the same for all
};

template <class C, bool TransposedA, bool TransposedB, Order order>
__global__ void product(Parameters p) {
  using T = typename C::Storage;
  using TileA = Tile<T, TransposedA ? kInner : kSize, TransposedA ? kSize : kInner>;
  using TileB = Tile<T, TransposedB ? kInner : kSize, TransposedB ? kSize : kInner>;
  using Square = Tile<T, kSize, kSize>;
  DYNAMIC_SHARED(memory);
  const TileA a(memory);
  const TileB b(memory + TileA::kBytes);
  const Square after(memory + TileA::kBytes + TileB::kBytes), kept(after.data + Square::kBytes);
  const int lane = threadIdx.x;
  const auto fetch = [&](auto tile, const void* from, int rows, int columns) {
    const T* const base = static_cast<const T*>(from);
    copy_tile<32>(tile, lane, copy_width<T>(base, {p.pitch}), columns, base,
                  [&](int r) { return r < rows ? base + r * p.pitch : nullptr; });
  };
  fetch(a, p.a, TransposedA ? p.k : p.m, TransposedA ? p.m : p.k);
  fetch(b, p.b, TransposedB ? p.k : p.n, TransposedB ? p.n : p.k);
  fetch(after, p.after, p.n, p.n);
  copy_async_commit();
  copy_async_wait<0>();
  __syncthreads();

  const Reader<C, TileA, Side::kA, TransposedA, order> read_a;
  const Reader<C, TileB, Side::kB, TransposedB, order> read_b;
  const Reader<C, Square, Side::kB, true, Order::kPaired> read_after;
  for (int row = 0; row < kSize; row += 16) {
    float d[kSize / 8][4] = {}, e[kSize / 8][4] = {};
    for (int k = 0; k < kInner; k += kDepth<C>) {
      const Fragment<C> fa = read_a(a, TransposedA ? k : row, TransposedA ? row : k);
      for (int n = 0; n < kSize; n += 16) {
        multiply(d[n / 8], d[n / 8 + 1], fa, read_b(b, TransposedB ? k : n, TransposedB ? n : k));
      }
    }
    for (int k = 0; k < kSize; k += kDepth<C>) {
      const Fragment<C> fa = accumulators_as_a<C>(d + k / 8);
      for (int n = 0; n < kSize; n += 16) multiply(e[n / 8], e[n / 8 + 1], fa, read_after(after, k, n));
    }
    for (int block = 0; block < kSize / 8; ++block) {
      store_accumulators(kept, row, block * 8, d[block]);
      for (int i = 0; i < 4; ++i) {
        const int at = (row + lane / 4 + i / 2 * 8) * kSize + block * 8 + lane % 4 * 2 + i % 2;
        store_global(p.d + at, d[block][i]);
        store_global(p.e + at, e[block][i]);
      }
    }
  }
  __syncthreads();
  for (int row = 0; row < kSize; ++row) {
    store_global(static_cast<T*>(p.kept) + row * kSize + lane, load_shared(kept.at(row, lane)));
  }
}

template <class C>
void run(const Parameters& p, bool transposed_a, bool transposed_b, bool paired) {
  constexpr size_t kShared = (2 * kSize * kInner + 2 * kSize * kSize) * sizeof(typename C::Storage);
  const auto kernel =
      paired ? product<C, true, true, Order::kPaired>
      : transposed_a
          ? (transposed_b ? product<C, true, true, Order::kPlain> : product<C, true, false, Order::kPlain>)
          : (transposed_b ? product<C, false, true, Order::kPlain> : product<C, false, false, Order::kPlain>);
  launch({"product", 1, 32, nullptr, kShared}, kernel, p);
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT void run_product(const char* arithmetic, const Parameters* p, bool transposed_a, bool transposed_b,
                        bool paired) {
  const std::map<std::string, void (*)(const Parameters&, bool, bool, bool)> kRuns = {
      {"bf16", run<Bf16>}, {"fp16", run<Fp16>}, {"tf32", run<Tf32>}, {"fp32", run<Fp32>}};
  simt::reset_counters();
  simt::set_counting(true);
  kRuns.at(arithmetic)(*p, transposed_a, transposed_b, paired);
  simt::set_counting(false);
}

EXPORT uint64_t conflicts() {
  const simt::Counters& c = simt::counters().at("product");
  return c.shared_load_conflicts + c.shared_store_conflicts;
}

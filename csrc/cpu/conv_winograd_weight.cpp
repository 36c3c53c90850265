// The gradient of a 3x3 convolution's weight by Winograd's algorithm (winograd.h), transposed: for each of the 36
// points the transformed x times the transformed gradient of y, summed over tiles, and the sums back to 3x3 taps. A
// share is some input by some output channels: their sums, and a block of tiles of both operands, stay in the
// second-level cache. Blocks are divided into chunks with sums of their own, added in their order: the result depends
// on the number of threads at most, never on their timing.
#include <atomic>

#include "conv_bias.h"
#include "winograd.h"

namespace fastnets::FASTNETS_ISA {
namespace {

using T = float;
constexpr int64_t kBlockTiles = 48;
constexpr int kProductRows = kTileRows / 2;  // as many registers hold the sums twice
constexpr int64_t kSumTiles = 16;
constexpr int64_t kShareRows = 64, kShareCols = 64;  // channels of x, of y
constexpr int64_t kBufferBytes = 64 << 20;           // for the sums of chunks that share outputs

// [4] -> [6]: a polynomial's value at the points; the transpose of results from products.
FASTNETS_INLINE void grad_transform(const Vec<T> (&y)[kOut], Vec<T> (&t)[kIn]) {
  const auto c = [](double x) { return broadcast<T>(static_cast<T>(x)); };
  const Vec<T> even_p = fma<T>(c(kP2), y[2], y[0]), odd_p = fma<T>(c(kP2), y[3], y[1]);
  const Vec<T> even_q = fma<T>(c(kQ2), y[2], y[0]), odd_q = fma<T>(c(kQ2), y[3], y[1]);
  t[0] = y[0];
  t[1] = fma<T>(c(kP), odd_p, even_p);
  t[2] = fma<T>(c(-kP), odd_p, even_p);
  t[3] = fma<T>(c(kQ), odd_q, even_q);
  t[4] = fma<T>(c(-kQ), odd_q, even_q);
  t[5] = y[3];
}

// [6] -> [3]: the transpose of a weight's values at the points.
FASTNETS_INLINE void taps_transform(const Vec<T> (&m)[kIn], Vec<T> (&w)[kTaps]) {
  const auto c = [](double x) { return broadcast<T>(static_cast<T>(x)); };
  const Vec<T> sum_p = c(kAtP) * (m[1] + m[2]), sum_q = c(kAtQ) * (m[3] + m[4]);
  w[0] = fma<T>(c(1 / (kP2 * kQ2)), m[0], sum_p + sum_q);
  w[1] = fma<T>(c(kP * kAtP), m[1] - m[2], c(kQ * kAtQ) * (m[3] - m[4]));
  w[2] = fma<T>(c(kP2), sum_p, fma<T>(c(kQ2), sum_q, m[5]));
}

// to[kRows][to_row] += over tiles, x[tile][kRows] times grad[tile][kTileVectors]. kSumTiles products are summed up
// before they join the others, since the transforms multiply the rounding of these sums.
template <int kRows>
void multiply_of(int64_t tiles, const T* x, int64_t x_row, const T* grad, int64_t grad_row, T* to, int64_t to_row) {
  constexpr int lanes = kLanes<T>;
  Vec<T> total[kRows][kTileVectors] = {};
  for (int64_t begin = 0; begin < tiles; begin += kSumTiles) {
    Vec<T> sum[kRows][kTileVectors] = {};
    for (int64_t tile = begin, end = at_most(begin + kSumTiles, tiles); tile < end;
         ++tile, x += x_row, grad += grad_row) {
      Vec<T> right[kTileVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) {
        right[v] = load(grad + v * lanes);
        in_register<T>(right[v]);
      }
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const Vec<T> left = broadcast<T>(x[r]);
#pragma GCC unroll 4
        for (int v = 0; v < kTileVectors; ++v) sum[r][v] = fma<T>(left, right[v], sum[r][v]);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) total[r][v] += sum[r][v];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) {
      T* at = to + r * to_row + v * lanes;
      store(at, load(at) + total[r][v]);
    }
  }
}

template <class S>
struct WinogradWeight {
  const ConvGradWeight& p;
  Axis axes[3], grad_axes[3];
  Strides x, grad;
  Strips strips;

  WinogradWeight(const ConvGradWeight& p, const Axis (&along)[3])
      : p(p),
        axes{along[0], along[1], along[2]},
        grad_axes{},
        x(strides_of(p.shape.channels_last, p.shape.groups * p.shape.in_channels, p.shape.in)),
        grad(strides_of(p.shape.channels_last, p.shape.groups * p.shape.out_channels, p.shape.out)),
        strips{axes, p.shape.batch, p.shape.in_channels, kBlockTiles} {
    for (int d = 0; d < 3; ++d) {
      const int64_t size = p.shape.out[d];
      grad_axes[d] = {size, 0, 1, 1, 1, 0, 1, 0, 1, size};
    }
  }

  // Channels of a share, and how its operands and sums lie: [point][tile][row], [point][x channel][cols].
  struct Share {
    int64_t group, first_row, rows, first_col, cols;
    int64_t row() const { return round_up(rows, kProductRows); }
    int64_t col() const { return round_up(cols, kTileCols<T>); }
    int64_t x_plane() const { return kBlockTiles * row() + kPad; }
    int64_t grad_plane() const { return kBlockTiles * col() + kPad; }
    int64_t sum_plane() const { return row() * col() + kPad; }
  };

  // [tile][channel] of each point, of the strip's part of a source, whose pixels are added to `bias`, if any.
  template <int kSide, class Transform>
  void transform_strip(const S* from, const Strides& strides, const Axis* along, const Strip& strip, int64_t channels,
                       const Transform& apply, T* to, int64_t row, int64_t plane, BiasLine<T> bias = {}) const {
    const Block block = strips.whole(along, strip, channels);
    T* staged = static_cast<T*>(scratch(kStageSlot, block.elements() * sizeof(T)));
    stage(from, strides, along, block, channels, staged);
    if (bias) add_pixels(staged, block.channels, block.pixels(), channels, bias);  // zeros past the border
    for (int64_t tile = 0; tile < strip.tiles; ++tile, to += row) {
      for (int64_t c = 0; c < channels; c += kLanes<T>) {
        const T* at = staged + tile * kOut * block.stride(2) + c;
        transform<T, kSide, kIn>(
            [&](int i, int j) { return load(at + i * block.stride(1) + j * block.stride(2)); }, apply,
            [&](int i, int j, Vec<T> v) {
              store_partial(to + (i * kIn + j) * plane + c, v, static_cast<int>(at_most(kLanes<T>, row - c)));
            });
      }
    }
  }

  // Adds the products of strips [begin, end) to the share's sums, and their gradient to its bias's, if any.
  void accumulate(const Share& share, int64_t begin, int64_t end, T* sums, BiasLine<T> bias) const {
    const ConvShape& s = p.shape;
    const int64_t in_pixels = s.in[0] * s.in[1] * s.in[2], out_pixels = s.out[0] * s.out[1] * s.out[2];
    T* left = static_cast<T*>(scratch(kTransformSlot, kPoints * (share.x_plane() + share.grad_plane()) * sizeof(T)));
    T* right = left + kPoints * share.x_plane();
    const S* from = static_cast<const S*>(p.x) + (share.group * s.in_channels + share.first_row) * x.channel;
    const S* from_grad =
        static_cast<const S*>(p.grad) + (share.group * s.out_channels + share.first_col) * grad.channel;
    for (int64_t strip = begin; strip < end;) {
      int64_t tiles = 0;
      for (; strip < end && tiles + strips(strip).tiles <= kBlockTiles; ++strip) {
        const Strip now = strips(strip);
        transform_strip<kIn>(
            from + now.image * s.groups * s.in_channels * in_pixels, x, axes, now, share.rows,
            [](const auto& d, auto& t) { source_transform<T>(d, t); }, left + tiles * share.row(), share.row(),
            share.x_plane());
        transform_strip<kOut>(
            from_grad + now.image * s.groups * s.out_channels * out_pixels, grad, grad_axes, now, share.cols,
            [](const auto& y, auto& t) { grad_transform(y, t); }, right + tiles * share.col(), share.col(),
            share.grad_plane(), bias);
        tiles += now.tiles;
      }
      for (int64_t point = 0; point < kPoints; ++point) {
        const T *a = left + point * share.x_plane(), *b = right + point * share.grad_plane();
        T* to = sums + point * share.sum_plane();
        for (int64_t r = 0; r < share.rows; r += kProductRows) {
          with_count<kProductRows>(static_cast<int>(at_most(kProductRows, share.rows - r)), [&](auto n) {
            for (int64_t c = 0; c < share.cols; c += kTileCols<T>) {
              multiply_of<n.value>(tiles, a + r, share.row(), b + c, share.col(), to + r * share.col() + c,
                                   share.col());
            }
          });
        }
      }
    }
  }

  // The chunks' sums to taps, to the weight's gradient; false where one is infinite or not a number.
  bool write(const Share& share, const T* sums, int64_t chunks, int64_t chunk_size) const {
    const ConvShape& s = p.shape;
    const int64_t* strides = s.weight_strides;
    Vec<T> finite{};
    S* group = static_cast<S*>(p.grad_weight) + (share.group * s.out_channels + share.first_col) * strides[0] +
               share.first_row * strides[1];
    for (int64_t first = 0; first < share.rows; first += kLanes<T>) {
      const int64_t rows = at_most(kLanes<T>, share.rows - first);
      for (int64_t c = 0; c < share.cols; c += kLanes<T>) {
        const int n = static_cast<int>(at_most(kLanes<T>, share.cols - c));
        T taps[kTaps][kTaps][kLanes<T>][kLanes<T>];  // [row][column]; transposed, they lie together
        for (int64_t r = 0; r < rows; ++r) {
          const T* from = sums + (first + r) * share.col() + c;
          transform<T, kIn, kTaps>(
              [&](int i, int j) {
                const T* at = from + (i * kIn + j) * share.sum_plane();
                Vec<T> total = load(at);
                for (int64_t chunk = 1; chunk < chunks; ++chunk) total += load(at + chunk * chunk_size);
                return total;
              },
              [](const auto& m, auto& w) { taps_transform(m, w); },
              [&](int i, int j, Vec<T> value) {
                finite += keep_first<T>(value, n, T(0)) * T(0);
                store(taps[i][j][r], value);
              });
        }
        for (int k = 0; k < n; ++k) {
          for (int t = 0; t < kTaps * kTaps; ++t) {
            const int i = t / kTaps, j = t % kTaps;
            S* to = group + (c + k) * strides[0] + first * strides[1] + i * strides[3] + j * strides[4];
            for (int64_t r = 0; r < rows; ++r) to[r * strides[1]] = from_float<S>(taps[i][j][r][k]);
          }
        }
      }
    }
    return reduce_add<T>(finite) == 0;
  }

  bool run() const {
    const ConvShape& s = p.shape;
    const int64_t row_shares = (s.in_channels + kShareRows - 1) / kShareRows;
    const int64_t col_shares = (s.out_channels + kShareCols - 1) / kShareCols,
                  shares = s.groups * row_shares * col_shares;
    const auto share_of = [&](int64_t i) {
      const int64_t row = i % row_shares * kShareRows, col = i / row_shares % col_shares * kShareCols;
      return Share{i / row_shares / col_shares, row, at_most(kShareRows, s.in_channels - row), col,
                   at_most(kShareCols, s.out_channels - col)};
    };
    const int64_t size = kPoints * share_of(0).sum_plane(), count = strips.count(), threads = thread_count();
    // Enough pieces for the threads, as far as memory for sums goes.
    const int64_t buffers = kBufferBytes / (shares * size * static_cast<int64_t>(sizeof(T))) + 1;
    const int64_t wanted = threads > 1 && shares < 4 * threads ? (2 * threads + shares - 1) / shares : 1;
    const int64_t chunks = at_most(wanted, at_most(count, buffers));
    T* sums = static_cast<T*>(scratch(kWeightSlot, chunks * shares * size * sizeof(T)));
    const BiasSums<T> bias(p, chunks);
    parallel(chunks * shares, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t chunk = i / shares;
        const Share share = share_of(i % shares);
        const BiasLine<T> line = share.first_row == 0 ? bias.piece(chunk) : BiasLine<T>{};
        std::memset(sums + i * size, 0, static_cast<size_t>(size) * sizeof(T));
        accumulate(share, count * chunk / chunks, count * (chunk + 1) / chunks, sums + i * size,
                   line.from(share.group * s.out_channels + share.first_col));
      }
    });
    bias.template write<S>();
    std::atomic<bool> finite{true};
    parallel(shares, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        if (!write(share_of(i), sums + i * size, chunks, shares * size)) finite = false;
      }
    });
    return finite;
  }
};

}  // namespace

bool winograd_grad_weight(const ConvGradWeight& p, const Axis (&axes)[3]) {
  if (!winograd_fits(p.shape, axes)) return false;
  switch (p.shape.dtype) {
    case Dtype::kFloat32: return WinogradWeight<float>(p, axes).run();
    case Dtype::kBFloat16: return WinogradWeight<BFloat16>(p, axes).run();
    default: return WinogradWeight<Float16>(p, axes).run();
  }
}

}  // namespace fastnets::FASTNETS_ISA

// 3x3 convolution of stride 1 by Winograd's algorithm (winograd.h). A block, what a thread does at once, is some
// strips: their transformed source stays in the second-level cache while the panels of the transformed weight pass by.
#include "winograd.h"

namespace fastnets::FASTNETS_ISA {
namespace {

constexpr int kProductRows = kTileRows / 2;  // as many registers hold the sums twice
constexpr int64_t kBlockTiles = 8 * kProductRows;
constexpr int64_t kSumDepth = 8;

constexpr int64_t kLeastChannels = 16;  // for the transforms to pay

// [3] -> [6]: the polynomial g at the points, over the product of each point's distances from the others.
template <class T>
FASTNETS_INLINE void weight_transform(const Vec<T> (&g)[kTaps], Vec<T> (&t)[kIn]) {
  const auto c = [](double x) { return broadcast<T>(static_cast<T>(x)); };
  const Vec<T> even_p = fma<T>(c(kP2 * kAtP), g[2], c(kAtP) * g[0]);
  const Vec<T> even_q = fma<T>(c(kQ2 * kAtQ), g[2], c(kAtQ) * g[0]);
  t[0] = c(1 / (kP2 * kQ2)) * g[0];
  t[1] = fma<T>(c(kP * kAtP), g[1], even_p);
  t[2] = fma<T>(c(-kP * kAtP), g[1], even_p);
  t[3] = fma<T>(c(kQ * kAtQ), g[1], even_q);
  t[4] = fma<T>(c(-kQ * kAtQ), g[1], even_q);
  t[5] = g[2];
}

// [6] -> [4]: the transpose of evaluation at the points.
template <class T>
FASTNETS_INLINE void result_transform(const Vec<T> (&m)[kIn], Vec<T> (&y)[kOut]) {
  const auto c = [](double x) { return broadcast<T>(static_cast<T>(x)); };
  const Vec<T> sum_p = m[1] + m[2], difference_p = m[1] - m[2], sum_q = m[3] + m[4], difference_q = m[3] - m[4];
  y[0] = m[0] + sum_p + sum_q;
  y[1] = fma<T>(c(kP), difference_p, c(kQ) * difference_q);
  y[2] = fma<T>(c(kP2), sum_p, c(kQ2) * sum_q);
  y[3] = fma<T>(c(kP2 * kP), difference_p, fma<T>(c(kQ2 * kQ), difference_q, m[5]));
}

// sums[kRows][kVectors] = the rows times the panel [depth][kVectors]. kSumDepth products are summed up before they join
// the others: the transforms multiply the rounding of these sums, and need it that small.
template <class T, int kRows, int kVectors>
void multiply_of(const T* const* rows, int64_t depth, const T* panel, T* sums) {
  constexpr int lanes = kLanes<T>;
  Vec<T> total[kRows][kVectors] = {};
  for (int64_t begin = 0; begin < depth; begin += kSumDepth) {
    Vec<T> sum[kRows][kVectors] = {};
    for (int64_t p = begin, end = at_most(begin + kSumDepth, depth); p < end; ++p, panel += kVectors * lanes) {
      Vec<T> right[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        right[v] = load(panel + v * lanes);
        in_register<T>(right[v]);
      }
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const Vec<T> left = broadcast<T>(rows[r][p]);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sum[r][v] = fma<T>(left, right[v], sum[r][v]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) total[r][v] += sum[r][v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) store(sums + (r * kVectors + v) * lanes, total[r][v]);
  }
}

// vectors is 1 or kTileVectors, rows at most kProductRows.
template <class T>
FASTNETS_INLINE void multiply(int vectors, int rows, const T* const* row, int64_t depth, const T* panel, T* sums) {
  with_count<kProductRows>(rows, [&](auto n) {
    if (vectors == kTileVectors) {
      multiply_of<T, n.value, kTileVectors>(row, depth, panel, sums);
    } else {
      multiply_of<T, n.value, 1>(row, depth, panel, sums);
    }
  });
}

// Elements that a point's planes of a transformed panel take: of a full one, and of one of `vectors`.
template <class T>
int64_t weight_plane(int64_t depth, int vectors = kTileVectors) {
  return depth * vectors * kLanes<T> + kPad;
}

// taps [panel][3 x 3][channel][column] -> [panel][6 x 6][channel][column], a panel kPoints full planes
template <class T>
void transform_weight(const Phase& phase, const T* taps, T* to) {
  const int64_t depth = phase.source_channels, panels = panel_count<T>(phase.channels);
  parallel(panels * depth, kGrain / (kPoints * kTileCols<T>)+1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i / depth * kTileCols<T>, channel = i % depth;
      const int vectors = panel_vectors<T>(phase.channels, first);
      const int64_t row = vectors * kLanes<T>, plane = depth * row, put_plane = weight_plane<T>(depth, vectors);
      for (int v = 0; v < vectors; ++v) {
        const int64_t at = channel * row + v * kLanes<T>;
        const T* from = taps + first * depth * kTaps * kTaps + at;
        T* put = to + i / depth * kPoints * weight_plane<T>(depth) + at;
        transform<T, kTaps, kIn>([&](int i, int j) { return load(from + (i * kTaps + j) * plane); },
                                 [](const auto& g, auto& t) { weight_transform<T>(g, t); },
                                 [&](int i, int j, Vec<T> value) { store(put + (i * kIn + j) * put_plane, value); });
      }
    }
  });
}

template <class S>
struct Winograd {
  using T = float;
  const Phase& phase;
  const Strips strips{phase.axes, phase.p.shape.batch, phase.source_channels, kBlockTiles};
  const int64_t depth = phase.source_channels, depth_row = round_up(depth, kLanes<T>);
  const int64_t source_plane = kBlockTiles * depth_row + kPad, product_plane = kBlockTiles * kTileCols<T> + kPad;

  // Strips [begin, end), no more than kBlockTiles tiles.
  void run(int64_t group, int64_t begin, int64_t end, const T* weight, const T* taps) const {
    T* source = static_cast<T*>(scratch(kTransformSlot, kPoints * (source_plane + product_plane) * sizeof(T)));
    T* products = source + kPoints * source_plane;
    int64_t tiles = 0;
    for (int64_t i = begin; i < end; ++i) {
      const Strip strip = strips(i);
      transform_source(strip, group, source + tiles * depth_row);
      tiles += strip.tiles;
    }
    const int64_t pieces = (tiles + kProductRows - 1) / kProductRows;
    const int rows = static_cast<int>((tiles + pieces - 1) / pieces);
    for (int64_t first = 0; first < phase.channels; first += kTileCols<T>) {
      const int vectors = panel_vectors<T>(phase.channels, first);
      for (int64_t point = 0; point < kPoints; ++point) {
        const T* panel =
            weight + first / kTileCols<T> * kPoints * weight_plane<T>(depth) + point * weight_plane<T>(depth, vectors);
        for (int64_t tile = 0; tile < tiles; tile += rows) {
          const T* row[kProductRows];
          for (int r = 0; r < rows; ++r) {
            row[r] = source + point * source_plane + at_most(tile + r, tiles - 1) * depth_row;
          }
          // The last piece may write past its tiles, into the plane's own end.
          multiply<T>(vectors, rows, row, depth, panel, products + point * product_plane + tile * vectors * kLanes<T>);
        }
      }
      tiles = 0;
      for (int64_t i = begin; i < end; ++i) {
        const Strip strip = strips(i);
        if (!write_results(strip, group, first, vectors, products + tiles * vectors * kLanes<T>)) {
          gather_block(phase, strips.results(strip), strip.image, group, taps, first / kTileCols<T>);
        }
        tiles += strip.tiles;
      }
    }
  }

  void transform_source(const Strip& strip, int64_t group, T* to) const {
    const ConvShape& s = phase.p.shape;
    const int64_t pixels = phase.axes[0].extent * phase.axes[1].extent * phase.axes[2].extent;
    const S* from = static_cast<const S*>(phase.p.source) + strip.image * s.groups * depth * pixels +
                    group * depth * phase.source.channel;
    const Block block = Strips::whole(phase.axes, strip, depth);
    T* staged = static_cast<T*>(scratch(kStageSlot, block.elements() * sizeof(T)));
    stage(from, phase.source, phase.axes, block, depth, staged);
    for (int64_t tile = 0; tile < strip.tiles; ++tile, to += depth_row) {
      for (int64_t c = 0; c < depth_row; c += kLanes<T>) {
        const T* at = staged + tile * kOut * block.stride(2) + c;
        transform<T, kIn, kIn>(
            [&](int i, int j) { return load(at + i * block.stride(1) + j * block.stride(2)); },
            [](const auto& d, auto& t) { source_transform<T>(d, t); },
            [&](int i, int j, Vec<T> value) { store(to + (i * kIn + j) * source_plane + c, value); });
      }
    }
  }

  // Writes one panel of a strip, unless a sum is infinite or not a number: the transforms spread such a source over its
  // whole tile, and overflow earlier. Returns whether it did.
  bool write_results(const Strip& strip, int64_t group, int64_t first, int vectors, const T* products) const {
    const ConvShape& s = phase.p.shape;
    const Block block = strips.results(strip);
    const int64_t row = vectors * kLanes<T>, height = block.axes[1].count, width = block.axes[2].count;
    const int64_t pixels = phase.result_sizes[0] * phase.result_sizes[1] * phase.result_sizes[2];
    const Finish<T, S> finish{
        phase, block, strip.image * s.groups * phase.channels * pixels + group * phase.channels * phase.result.channel,
        group * phase.channels};
    T* sums = static_cast<T*>(scratch(kSumSlot, block.pixels() * row * sizeof(T)));
    T* to = sums;
    int64_t line = width * row, step = row;
    Vec<T> bias[kTileVectors] = {};
    bool direct = false;  // where nothing comes after the bias the results go where they belong at once
    if constexpr (std::is_same_v<S, T>) {
      direct = s.channels_last && finish.plain() && first + row <= phase.channels;
      if (direct) {
        to = static_cast<T*>(phase.p.result) + finish.offset(0, 0) + first;
        line = phase.result.at[1], step = phase.result.at[2];
        const T* given = static_cast<const T*>(phase.p.bias);
        for (int v = 0; given && v < vectors; ++v) bias[v] = load(given + finish.channel + first + v * kLanes<T>);
      }
    }
    Vec<T> finite{};  // a zero, or not a number
    for (int64_t tile = 0; tile < strip.tiles; ++tile, products += row) {
      const int64_t wide = at_most(kOut, width - tile * kOut);
      for (int v = 0; v < vectors; ++v) {
        Vec<T> total[kOut] = {};  // a row's
        transform<T, kIn, kOut>(
            [&](int i, int j) { return load(products + (i * kIn + j) * product_plane + v * kLanes<T>); },
            [](const auto& m, auto& y) { result_transform<T>(m, y); },
            [&](int i, int j, Vec<T> value) {
              total[i] += value;
              if (i >= height || j >= wide) return;
              store(to + i * line + (tile * kOut + j) * step + v * kLanes<T>, value + bias[v]);
            });
        finite += (total[0] * T(0) + total[1] * T(0)) + (total[2] * T(0) + total[3] * T(0));
      }
    }
    if (reduce_add<T>(finite) != 0) return false;
    if (direct) return true;
    if (s.channels_last) {
      Walk results = finish.results();
      for (int64_t q = 0; q < block.pixels(); q += kTileRows, sums += kTileRows * row) {
        S* at[kTileRows];
        results.take(kTileRows, static_cast<S*>(phase.p.result) + first, at);
        finish.channels_last(first, vectors, sums, at, at_most(kTileRows, block.pixels() - q));
      }
    } else {
      finish.planes(first, vectors, sums);
    }
    return true;
  }
};

template <class S>
void gather_tiles(const Phase& phase) {
  using T = float;
  const ConvShape& s = phase.p.shape;
  const Winograd<S> winograd{phase};
  const int64_t panels = panel_count<T>(phase.channels);
  T* weight = static_cast<T*>(scratch(kWeightSlot, panels * kPoints * weight_plane<T>(winograd.depth) * sizeof(T)));
  T* taps = static_cast<T*>(scratch(kGradSlot, panels * kTileCols<T> * winograd.depth * kTaps * kTaps * sizeof(T)));
  const int64_t count = winograd.strips.count(), threads = thread_count();
  int64_t block = kBlockTiles / winograd.strips.most;  // strips
  if (threads > 1) block = at_most(block, (count + 3 * threads - 1) / (3 * threads));
  const int64_t blocks = (count + block - 1) / block;
  for (int64_t group = 0; group < s.groups; ++group) {
    pack_weight<T>(phase, static_cast<const S*>(phase.p.weight) + group * phase.group_stride, taps);
    transform_weight<T>(phase, taps, weight);
    parallel(blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        winograd.run(group, i * block, at_most((i + 1) * block, count), weight, taps);
    });
  }
}

}  // namespace

bool winograd_fits(const ConvShape& s, const Axis* axes) {
  if (s.dtype == Dtype::kFloat64 || axes[0].taps != 1) return false;
  for (int d = 1; d < 3; ++d) {
    const Axis& axis = axes[d];
    if (axis.taps != kTaps || axis.pull != 1 || axis.step != 1 || axis.offset_step != 1 || axis.count < kOut) {
      return false;
    }
  }
  if (s.in_channels < kLeastChannels || s.out_channels < kLeastChannels) return false;
  const Strips strips{axes, s.batch, 0, kBlockTiles};
  // Its products run at two thirds of the direct ones' speed, and the weight's transform, where it outgrows the caches,
  // takes as long as the products of some tiles.
  const int64_t weight = s.in_channels * s.out_channels,
                pixels = s.batch * axes[0].count * axes[1].count * axes[2].count;
  const int64_t transform = weight * kPoints * static_cast<int64_t>(sizeof(float)) > kCoreBytes ? 32 : 4;
  return 3 * (strips.tiles() + transform) * kPoints < 2 * pixels * kTaps * kTaps;
}

bool winograd_pays(const Phase& phase) { return winograd_fits(phase.p.shape, phase.axes); }

void winograd_gather(const Phase& phase) {
  switch (phase.p.shape.dtype) {
    case Dtype::kFloat32: return gather_tiles<float>(phase);
    case Dtype::kBFloat16: return gather_tiles<BFloat16>(phase);
    default: return gather_tiles<Float16>(phase);
  }
}

}  // namespace fastnets::FASTNETS_ISA

// Convolution by Winograd's algorithm (winograd.h): 3x3 of stride 1, and of larger strides what has 3x3 or 4x4 taps
// once source and taps are dealt out to parts. A block, what a thread does at once, is some strips: their transformed
// source stays in the second-level cache while the panels of the transformed weight pass by.
#include "winograd.h"

namespace fastnets::FASTNETS_ISA {
namespace {

constexpr int kProductRows = kTileRows / 2;  // as many registers hold the sums twice
constexpr int64_t kBlockTiles = 8 * kProductRows;
constexpr int64_t kSumDepth = 8, kMostSum = 12;

constexpr int64_t kLeastChannels = 16;  // for the transforms to pay
constexpr int64_t kMostParts = 64;      // channels of all parts together; more were not tried

// [3] or [4] -> [6]: the polynomial g at the points, over the product of each point's distances from the others.
template <class T, int kCount>
FASTNETS_INLINE void weight_transform(const Vec<T> (&g)[kCount], Vec<T> (&t)[kIn]) {
  const auto c = [](double x) { return broadcast<T>(static_cast<T>(x)); };
  const Vec<T> even_p = fma<T>(c(kP2 * kAtP), g[2], c(kAtP) * g[0]);
  const Vec<T> even_q = fma<T>(c(kQ2 * kAtQ), g[2], c(kAtQ) * g[0]);
  Vec<T> odd_p = c(kP * kAtP) * g[1], odd_q = c(kQ * kAtQ) * g[1];
  if constexpr (kCount == 4) {
    odd_p = fma<T>(c(kP2 * kP * kAtP), g[3], odd_p);
    odd_q = fma<T>(c(kQ2 * kQ * kAtQ), g[3], odd_q);
  }
  t[0] = c(1 / (kP2 * kQ2)) * g[0];
  t[1] = even_p + odd_p;
  t[2] = even_p - odd_p;
  t[3] = even_q + odd_q;
  t[4] = even_q - odd_q;
  t[5] = g[kCount - 1];
}

// [6] -> [4] or [3]: the transpose of evaluation at the points.
template <class T, int kCount>
FASTNETS_INLINE void result_transform(const Vec<T> (&m)[kIn], Vec<T> (&y)[kCount]) {
  const auto c = [](double x) { return broadcast<T>(static_cast<T>(x)); };
  const Vec<T> sum_p = m[1] + m[2], difference_p = m[1] - m[2], sum_q = m[3] + m[4], difference_q = m[3] - m[4];
  y[0] = m[0] + sum_p + sum_q;
  y[1] = fma<T>(c(kP), difference_p, c(kQ) * difference_q);
  if constexpr (kCount == 4) {
    y[2] = fma<T>(c(kP2), sum_p, c(kQ2) * sum_q);
    y[3] = fma<T>(c(kP2 * kP), difference_p, fma<T>(c(kQ2 * kQ), difference_q, m[5]));
  } else {
    y[2] = fma<T>(c(kP2), sum_p, fma<T>(c(kQ2), sum_q, m[5]));
  }
}

// With a stride, positions that lie it apart form a part of the source: of the taps, too, every part takes its own, at
// positions beside each other. What is left is a convolution of stride 1 whose channels are all parts' channels.
struct Parts {
  int64_t pull[2], low[2];  // of rows and columns: how many parts; the first result's first position, a part's first
  int64_t taps[2];          // of a part
  int64_t skip[2];          // positions from `low` to the first tap
  int64_t given[2];         // taps of the weight
  int64_t channels;         // of one part
  bool channels_last;

  explicit Parts(const Phase& phase) : channels(phase.source_channels), channels_last(phase.p.shape.channels_last) {
    for (int d = 0; d < 2; ++d) {
      const Axis& axis = phase.axes[d + 1];
      pull[d] = axis.pull, given[d] = axis.taps;
      skip[d] = (axis.offset % axis.pull + axis.pull) % axis.pull;
      low[d] = axis.offset - skip[d];
      taps[d] = (skip[d] + axis.taps + axis.pull - 1) / axis.pull;
    }
  }

  int64_t depth() const { return pull[0] * pull[1] * channels; }

  // What a channel of all is: a part's row, its column, the channel in it. In the order of memory.
  struct Channel {
    int64_t at[2], channel;
  };
  Channel channel(int64_t i) const {
    const int64_t row = i / (pull[1] * channels), rest = i % (pull[1] * channels);
    return channels_last ? Channel{{row, rest / channels}, rest % channels}
                         : Channel{{row, rest % pull[1]}, rest / pull[1]};
  }
  // The weight's tap that is tap i of such a part, or -1.
  int64_t tap(int d, int64_t i, const Channel& of) const {
    const int64_t tap = i * pull[d] + of.at[d] - skip[d];
    return tap < given[d] ? tap : -1;
  }
};

// Elements from one tile's channels to the next tile's.
template <class T>
constexpr int64_t row_of(int64_t depth) {
  return round_up(depth <= kMostSum ? kMostSum : depth, kLanes<T>);
}

// sums[kRows][kVectors] = the rows, `row` apart, times the panel [depth][kVectors]. Up to kMostSum products are summed
// up; of more, kSumDepth before they join the others: the transforms multiply the rounding of these sums, and need it
// that small.
template <class T, int kRows, int kVectors>
FASTNETS_INLINE void multiply_of(const T* rows, int64_t row, int64_t depth, const T* panel, Ahead& ahead, T* sums) {
  constexpr int lanes = kLanes<T>;
  Vec<T> total[kRows][kVectors] = {};
  const auto step = [&](int64_t p, Vec<T>(&sum)[kRows][kVectors], bool first) {
    Vec<T> right[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      right[v] = load(panel + (p * kVectors + v) * lanes);
      in_register<T>(right[v]);
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Vec<T> left = broadcast<T>(rows[r * row + p]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[r][v] = first ? left * right[v] : fma<T>(left, right[v], sum[r][v]);
    }
  };
  const auto join = [&](const Vec<T>(&sum)[kRows][kVectors]) {
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) total[r][v] += sum[r][v];
    }
  };
  int64_t p = 0;
  if constexpr (kRows <= kProductRows) {
    Vec<T> sum[kRows][kVectors];
    for (; p + kSumDepth <= depth; p += kSumDepth) {
      ahead.fetch();
#pragma GCC unroll 8
      for (int i = 0; i < kSumDepth; ++i) step(p + i, sum, i == 0);
      join(sum);
    }
    if (p < depth) step(p++, sum, true);
    for (; p < depth; ++p) step(p, sum, false);
    if (depth % kSumDepth != 0) join(sum);
  } else {
    for (; p < depth; ++p) step(p, total, false);
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) store(sums + (r * kVectors + v) * lanes, total[r][v]);
  }
}

// The products of all tiles at one point; vectors is 1 or kTileVectors. Past the last tile, where a piece ends, stands
// what does not matter.
template <class T>
void multiply(int vectors, int64_t tiles, const T* source, int64_t depth, const T* panel, const T* next, T* sums) {
  const int most = depth <= kMostSum ? kTileRows : kProductRows;  // rows at once
  const int64_t pieces = (tiles + most - 1) / most, row = row_of<T>(depth);
  const int64_t steps = pieces * (depth / kSumDepth);
  with_count<kTileRows>(static_cast<int>((tiles + pieces - 1) / pieces), [&](auto n) {
    constexpr int kRows = n.value;
    Ahead ahead{reinterpret_cast<const char*>(next), steps > 0 ? depth * vectors * kVectorBytes / steps : 0};
    const int64_t apart = kRows > kProductRows ? row_of<T>(kMostSum) : row;
    for (int64_t tile = 0; tile < tiles; tile += kRows, source += kRows * apart, sums += kRows * vectors * kLanes<T>) {
      if (vectors == kTileVectors) {
        multiply_of<T, kRows, kTileVectors>(source, apart, depth, panel, ahead, sums);
      } else {
        multiply_of<T, kRows, 1>(source, apart, depth, panel, ahead, sums);
      }
    }
  });
}

// Elements that a point's planes of a transformed panel take: of a full one, and of one of `vectors`.
template <class T>
int64_t weight_plane(int64_t depth, int vectors = kTileVectors) {
  return depth * vectors * kLanes<T> + kPad;
}

// taps [panel][tap][channel][column] -> [panel][6 x 6][channel of all parts][column], a panel kPoints full planes
template <class T, int kCount>
void transform_weight(const Phase& phase, const Parts& parts, const T* taps, T* to) {
  const int64_t depth = parts.depth(), panels = panel_count<T>(phase.channels);
  parallel(panels * depth, kGrain / (kPoints * kTileCols<T>)+1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i / depth * kTileCols<T>, channel = i % depth;
      const int vectors = panel_vectors<T>(phase.channels, first);
      const int64_t row = vectors * kLanes<T>, plane = parts.channels * row;
      const int64_t put_plane = weight_plane<T>(depth, vectors);
      const Parts::Channel of = parts.channel(channel);
      for (int v = 0; v < vectors; ++v) {
        const T* from = taps + first * phase.depth() + of.channel * row + v * kLanes<T>;
        T* put = to + i / depth * kPoints * weight_plane<T>(depth) + channel * row + v * kLanes<T>;
        transform<T, kCount, kIn>(
            [&](int i, int j) {
              const int64_t h = parts.tap(0, i, of), w = parts.tap(1, j, of);
              return h < 0 || w < 0 ? Vec<T>{} : load(from + (h * parts.given[1] + w) * plane);
            },
            [](const auto& g, auto& t) { weight_transform<T>(g, t); },
            [&](int i, int j, Vec<T> value) { store(put + (i * kIn + j) * put_plane, value); });
      }
    }
  });
}

template <class S, int kCount>
struct Winograd {
  using T = float;
  static constexpr int kResults = kIn - kCount + 1;  // of a tile along an axis
  const Phase& phase;
  const Parts parts{phase};
  const Strips strips{phase.axes, phase.p.shape.batch, phase.source_channels, kBlockTiles, kResults};
  const int64_t depth = parts.depth(), depth_row = row_of<T>(depth);
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
    for (int64_t first = 0; first < phase.channels; first += kTileCols<T>) {
      const int vectors = panel_vectors<T>(phase.channels, first);
      for (int64_t point = 0; point < kPoints; ++point) {
        const T* panel =
            weight + first / kTileCols<T> * kPoints * weight_plane<T>(depth) + point * weight_plane<T>(depth, vectors);
        multiply<T>(vectors, tiles, source + point * source_plane, depth, panel,
                    panel + weight_plane<T>(depth, vectors), products + point * product_plane);
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
    const S* from = static_cast<const S*>(phase.p.source) + strip.image * s.groups * phase.source_channels * pixels +
                    group * phase.source_channels * phase.source.channel;
    const int64_t width = strip.tiles * kResults + kCount - 1;
    T* staged = static_cast<T*>(scratch(kStageSlot, kIn * width * depth_row * sizeof(T)));
    if (parts.pull[0] == 1 && parts.pull[1] == 1) {
      stage(from, phase.source, phase.axes, strips.whole(phase.axes, strip, depth), depth, staged);
    } else {
      stage_parts(from, strip, width, staged);
    }
    for (int64_t tile = 0; tile < strip.tiles; ++tile, to += depth_row) {
      for (int64_t c = 0; c < depth_row; c += kLanes<T>) {
        const T* at = staged + tile * kResults * depth_row + c;
        transform<T, kIn, kIn>(
            [&](int i, int j) { return load(at + (i * width + j) * depth_row); },
            [](const auto& d, auto& t) { source_transform<T>(d, t); },
            [&](int i, int j, Vec<T> value) { store(to + (i * kIn + j) * source_plane + c, value); });
      }
    }
  }

  // The source of a strip, to [kIn][width][depth_row].
  void stage_parts(const S* source, const Strip& strip, int64_t width, T* to) const {
    std::memset(to, 0, static_cast<size_t>(kIn * width * depth_row) * sizeof(T));
    const Axis* axes = phase.axes;
    const Strides& strides = phase.source;
    const int64_t z = strip.plane * axes[0].pull + axes[0].offset;
    if (z < 0 || z >= axes[0].extent) return;
    const int64_t pull = parts.pull[1], extent = axes[2].extent, channels = parts.channels;
    const int64_t low = strip.column * kResults * pull + parts.low[1];
    const int64_t first = at_most(low < 0 ? (pull - 1 - low) / pull : 0, width);  // whose parts all lie in the row
    const int64_t past = extent <= low ? 0 : at_most((extent - low) / pull, width);
    for (int64_t i = 0; i < kIn; ++i) {
      for (int64_t a = 0; a < parts.pull[0]; ++a) {
        const int64_t y = (strip.row * kResults + i) * parts.pull[0] + parts.low[0] + a;
        if (y < 0 || y >= axes[1].extent) continue;
        const S* row = source + z * strides.at[0] + y * strides.at[1];
        T* line = to + i * width * depth_row + a * pull * channels;
        const auto one_by_one = [&](int64_t w) {
          for (int64_t b = 0; b < pull; ++b) {
            const int64_t x = low + w * pull + b;
            for (int64_t c = 0; x >= 0 && x < extent && c < channels; ++c) {
              line[w * depth_row + (parts.channels_last ? b * channels + c : c * pull + b)] =
                  to_float(row[x * strides.at[2] + c * strides.channel]);
            }
          }
        };
        if (first > 0) one_by_one(first - 1);
        if (past >= first && past < width) one_by_one(past);
        if (parts.channels_last) {
          const int64_t step = strides.at[2];
          if (step == channels) {
            copy_runs(row + (low + first * pull) * step, pull * step, pull * channels, past - first,
                      line + first * depth_row);
          } else {
            for (int64_t b = 0; b < pull; ++b) {
              copy_runs(row + (low + first * pull + b) * step, pull * step, channels, past - first,
                        line + first * depth_row + b * channels);
            }
          }
        } else {
          for (int64_t c = 0; c < channels; ++c) {
            copy_runs(row + low + first * pull + c * strides.channel, pull, pull, past - first,
                      line + first * depth_row + c * pull);
          }
        }
      }
    }
  }

  // `count` runs of n elements, `step` apart, to places depth_row apart.
  void copy_runs(const S* from, int64_t step, int64_t n, int64_t count, T* to) const {
    for (int64_t i = 0; i < count; ++i, from += step, to += depth_row) {
      if (n == 2) {
        to[0] = to_float(from[0]), to[1] = to_float(from[1]);
      } else if (kVectorBytes == 64) {  // which has masks
        copy_converted<T>(from, n, to);
      } else {
        for (int64_t k = 0; k < n; ++k) to[k] = to_float(from[k]);
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
    const bool streams = direct && finish.streams(phase.channels);
    Vec<T> finite{};  // a zero, or not a number
    for (int64_t tile = 0; tile < strip.tiles; ++tile, products += row) {
      const int64_t wide = at_most(kResults, width - tile * kResults);
      for (int v = 0; v < vectors; ++v) {
        Vec<T> total[kResults] = {};  // a row's
        transform<T, kIn, kResults>(
            [&](int i, int j) { return load(products + (i * kIn + j) * product_plane + v * kLanes<T>); },
            [](const auto& m, auto& y) { result_transform<T>(m, y); },
            [&](int i, int j, Vec<T> value) {
              total[i] += value;
              if (i >= height || j >= wide) return;
              put<T>(to + i * line + (tile * kResults + j) * step + v * kLanes<T>, value + bias[v], streams);
            });
#pragma GCC unroll 4
        for (int i = 0; i < kResults; ++i) finite += total[i] * T(0);
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

// Whether a strided convolution's parts are one that pays.
bool parts_fit(const Phase& phase) {
  const Axis* axes = phase.axes;
  if (phase.p.shape.dtype == Dtype::kFloat64 || axes[0].taps != 1) return false;
  for (int d = 1; d < 3; ++d) {
    if (axes[d].pull < 2 || axes[d].step != 1 || axes[d].offset_step != 1) return false;
  }
  const Parts parts(phase);
  const int64_t taps = parts.taps[0];
  if (taps != parts.taps[1] || taps < 3 || taps > 4 || parts.depth() > kMostParts) return false;
  if (phase.channels < kLeastChannels) return false;
  const Strips strips{axes, phase.p.shape.batch, 0, kBlockTiles, kIn - taps + 1};
  const int64_t pixels = phase.p.shape.batch * phase.positions();
  // The products' and the transforms' cost, in direct products' time. AlexNet's 11x11 of stride 4 is just left out: it
  // was measured to be as fast either way.
  return 31 * (strips.tiles() + 8) * kPoints * (parts.depth() + 8) < 20 * pixels * phase.depth();
}

template <class S, int kCount>
void gather_tiles(const Phase& phase) {
  using T = float;
  const ConvShape& s = phase.p.shape;
  const Winograd<S, kCount> winograd{phase};
  const int64_t panels = panel_count<T>(phase.channels);
  T* weight = static_cast<T*>(scratch(kWeightSlot, panels * kPoints * weight_plane<T>(winograd.depth) * sizeof(T)));
  T* taps = static_cast<T*>(scratch(kGradSlot, panels * kTileCols<T> * phase.depth() * sizeof(T)));
  const int64_t count = winograd.strips.count(), threads = thread_count();
  int64_t block = kBlockTiles / winograd.strips.most;  // strips
  if (threads > 1) block = at_most(block, (count + 3 * threads - 1) / (3 * threads));
  const int64_t blocks = (count + block - 1) / block;
  for (int64_t group = 0; group < s.groups; ++group) {
    pack_weight<T>(phase, static_cast<const S*>(phase.p.weight) + group * phase.group_stride, taps);
    transform_weight<T, kCount>(phase, winograd.parts, taps, weight);
    parallel(blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        winograd.run(group, count * i / blocks, count * (i + 1) / blocks, weight, taps);
      }
      streamed();
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

bool winograd_pays(const Phase& phase) { return winograd_fits(phase.p.shape, phase.axes) || parts_fit(phase); }

void winograd_gather(const Phase& phase) {
  const auto gather = [&](auto kind) {
    using S = decltype(kind);
    Parts(phase).taps[0] == 4 ? gather_tiles<S, 4>(phase) : gather_tiles<S, 3>(phase);
  };
  switch (phase.p.shape.dtype) {
    case Dtype::kFloat32: return gather(float{});
    case Dtype::kBFloat16: return gather(BFloat16{});
    default: return gather(Float16{});
  }
}

}  // namespace fastnets::FASTNETS_ISA

// Convolution backwards to its weight: for every tap and channel of the staged x, the products with the gradient of y
// summed over pixels, a tile of elements by output channels at a time. Each piece of the work sums into a buffer of its
// own, packed as the weight is forwards; the buffers are added in their order, so the result depends on the number of
// threads at most, never on their timing.

#include "conv_bias.h"

namespace fastnets::FASTNETS_ISA {
namespace {

constexpr int64_t kBlockPixels = 16 * kTileRows;  // fewer than forwards: a panel of the gradient stays near
constexpr int64_t kBufferBytes = 64 << 20;        // for the sums of pieces that share outputs

struct Problem {
  const ConvGradWeight& p;
  Axis axes[3];
  Strides x, grad;
  Cut cut;
  int64_t taps, depth;  // of the operand rows: taps * channels
  int64_t chunks;       // the blocks are divided into
  int64_t shares;       // a group's panels are divided into

  int64_t blocks() const { return p.shape.batch * cut.count(); }
};

// to[kRows][kVectors] += over h x w pixels, the elements a[0 .. kRows) times the gradient b[h][pixel][kVectors], whose
// rows are b_h apart.
template <class T, int kRows, int kVectors>
void tile_of(int64_t height, int64_t width, const T* a, int64_t a_h, int64_t a_w, const T* b, int64_t b_h, int rows,
             T* to) {
  constexpr int lanes = kLanes<T>;
  Vec<T> sum[kRows][kVectors] = {};
  for (int64_t h = 0; h < height; ++h, a += a_h, b += b_h) {
    const T *at = a, *line = b;
    for (int64_t w = 0; w < width; ++w, at += a_w, line += kVectors * lanes) {
      Vec<T> right[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        right[v] = load(line + v * lanes);
        in_register<T>(right[v]);
      }
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const Vec<T> left = broadcast<T>(at[r]);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sum[r][v] = fma<T>(left, right[v], sum[r][v]);
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    if (r >= rows) break;
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      T* at = to + (r * kVectors + v) * lanes;
      store(at, load(at) + sum[r][v]);
    }
  }
}

template <class T, int kVectors>
void tile(int rows, int64_t height, int64_t width, const T* a, int64_t a_h, int64_t a_w, const T* b, int64_t b_h,
          T* to) {
  // Elements past `rows` are read (the stage is longer) and dropped.
  with_count<kTileRows, 2>(
      (rows + 1) / 2 * 2, [&](auto n) { tile_of<T, n.value, kVectors>(height, width, a, a_h, a_w, b, b_h, rows, to); });
}

// Channels last, whole rows: the next block's, a part of it after every tile of one of `panels`.
template <class S>
Ahead next_block(const Problem& problem, const Block& block, const S* source, int64_t panels) {
  const StagedAxis& h = block.axes[1];
  const int64_t rows = h.count * problem.axes[1].pull, row = problem.x.at[1];
  const int64_t tiles = panels * problem.taps * ((block.channels + kTileRows - 1) / kTileRows);
  const bool follows = problem.p.shape.channels_last && problem.p.shape.groups == 1 && problem.cut.pieces[2] == 1;
  const int64_t z = problem.axes[0].pull * block.axes[0].begin + problem.axes[0].offset, y = h.low + rows;
  return {reinterpret_cast<const char*>(source + z * problem.x.at[0] + y * row),
          follows ? rows * row * static_cast<int64_t>(sizeof(S)) / tiles : 0};
}

// Whether x can be read where it lies: one tap, no padding, channels last. A tile reads two channels at a time.
template <class T, class S>
bool reads_in_place(const Problem& problem) {
  const ConvShape& s = problem.p.shape;
  bool plain = std::is_same_v<S, T> && s.channels_last && s.in_channels % 2 == 0;
  for (const Axis& axis : problem.axes) plain = plain && axis.taps == 1 && axis.offset == 0;
  return plain;
}

// Adds one block's products to sums [panels of the share][depth][columns], and its gradient to the bias's, if any.
template <class T, class S>
void accumulate(const Problem& problem, int64_t image, const Block& block, int64_t group, int64_t panel_begin,
                int64_t panel_end, T* sums, BiasLine<T> bias) {
  const ConvShape& s = problem.p.shape;
  const int64_t height = block.axes[1].count, width = block.axes[2].count;
  const int64_t in_pixels = s.in[0] * s.in[1] * s.in[2], out_pixels = s.out[0] * s.out[1] * s.out[2];
  const S* from = static_cast<const S*>(problem.p.x) + image * s.groups * s.in_channels * in_pixels +
                  group * s.in_channels * problem.x.channel;
  const T* operand = nullptr;
  int64_t a_h = block.axes[1].pull * block.stride(1), a_w = block.axes[2].pull * block.stride(2);
  if constexpr (std::is_same_v<S, T>) {
    if (reads_in_place<T, S>(problem)) {
      operand = from;
      for (int d = 0; d < 3; ++d) operand += block.axes[d].low * problem.x.at[d];
      a_h = problem.axes[1].pull * problem.x.at[1], a_w = problem.axes[2].pull * problem.x.at[2];
    }
  }
  if (!operand) {
    T* staged = static_cast<T*>(scratch(kStageSlot, (block.elements() + kTileRows) * sizeof(T)));
    stage(from, problem.x, problem.axes, block, block.channels, staged);
    operand = staged;
  }
  Run* runs = static_cast<Run*>(scratch(kRunSlot, (problem.taps + 1) * sizeof(Run)));
  const int64_t count = runs_of(block, problem.axes, runs);
  T* staged_grad = static_cast<T*>(scratch(kGradSlot, block.pixels() * kTileCols<T> * sizeof(T)));
  const S* grad = static_cast<const S*>(problem.p.grad) + image * s.groups * s.out_channels * out_pixels +
                  group * s.out_channels * problem.grad.channel;
  Ahead ahead = next_block<S>(problem, block, from, panel_end - panel_begin);
  for (int64_t panel = panel_begin; panel < panel_end; ++panel) {
    const int64_t first = panel * kTileCols<T>;
    const int vectors = panel_vectors<T>(s.out_channels, first);
    const int columns = static_cast<int>(at_most(vectors * kLanes<T>, s.out_channels - first));
    // One panel of channels last lies as it would be staged.
    const bool in_place = std::is_same_v<S, T> && columns == vectors * kLanes<T> &&
                          columns == s.groups * s.out_channels && s.channels_last;
    const T* read = staged_grad;
    int64_t line = width * vectors * kLanes<T>;
    if constexpr (std::is_same_v<S, T>) {
      if (in_place) {
        line = problem.grad.at[1];
        read = grad + block.axes[0].begin * problem.grad.at[0] + block.axes[1].begin * line +
               block.axes[2].begin * problem.grad.at[2];
      }
    }
    if (!in_place) {
      const auto stage_panel = vectors == kTileVectors ? stage_grad<T, kTileVectors, S> : stage_grad<T, 1, S>;
      stage_panel(grad + first * problem.grad.channel, problem.grad, block, columns, staged_grad);
    }
    for (int64_t h = 0; bias && h < height; ++h) {
      add_pixels(read + h * line, vectors * kLanes<T>, width, columns, bias.from(group * s.out_channels + first));
    }
    T* to = sums + (panel - panel_begin) * kTileCols<T> * problem.depth;
    for (const Run* run = runs; run < runs + count; ++run) {
      for (int64_t e = 0; e < run->length; e += kTileRows) {
        const int rows = static_cast<int>(at_most(kTileRows, run->length - e));
        const T* a = operand + run->offset + e;
        ahead.fetch();
        if (vectors == kTileVectors) {
          tile<T, kTileVectors>(rows, height, width, a, a_h, a_w, read, line, to);
        } else {
          tile<T, 1>(rows, height, width, a, a_h, a_w, read, line, to);
        }
        to += rows * vectors * kLanes<T>;
      }
    }
  }
}

// The chunks' sums added, written through the weight's strides.
template <class T, class S>
void write(const Problem& problem, int64_t group, int64_t panel, const T* sums, int64_t chunk_size) {
  const ConvShape& s = problem.p.shape;
  const int64_t first = panel * kTileCols<T>, *strides = s.weight_strides;
  const int64_t width = panel_vectors<T>(s.out_channels, first) * kLanes<T>;
  const int64_t columns = at_most(width, s.out_channels - first);
  S* group_to = static_cast<S*>(problem.p.grad_weight) + (group * s.out_channels + first) * strides[0];
  for (int64_t tap = 0; tap < problem.taps; ++tap) {
    S* to = group_to + tap % s.kernel[2] * strides[4] + tap / s.kernel[2] % s.kernel[1] * strides[3] +
            tap / s.kernel[2] / s.kernel[1] * strides[2];
    for (int64_t c = 0; c < s.in_channels; ++c, sums += width) {
      T total[kTileCols<T>];
      for (int64_t k = 0; k < columns; ++k) total[k] = sums[k];
      for (int64_t chunk = 1; chunk < problem.chunks; ++chunk) {
        for (int64_t k = 0; k < columns; ++k) total[k] += sums[chunk * chunk_size + k];
      }
      for (int64_t k = 0; k < columns; ++k) to[c * strides[1] + k * strides[0]] = from_float<S>(total[k]);
    }
  }
}

template <class T, class S>
void grad_weight(Problem& problem) {
  const ConvShape& s = problem.p.shape;
  const int64_t panels = panel_count<T>(s.out_channels), threads = thread_count();
  const int64_t group_size = panels * kTileCols<T> * problem.depth, size = s.groups * group_size;
  problem.cut = choose_cut<T>(problem.axes, s.in_channels, s.batch * s.groups, kBlockPixels, kStageBytes, false);
  // Enough pieces for the threads: by panels where there are many, else by blocks, as far as memory for sums goes.
  problem.chunks = problem.shares = 1;
  if (s.groups < threads) {
    if (panels >= 4 * threads) {
      problem.shares = threads;
    } else {
      const int64_t buffers = kBufferBytes / (size * static_cast<int64_t>(sizeof(T))) + 1;
      problem.chunks = at_most((threads + s.groups - 1) / s.groups, at_most(problem.blocks(), buffers));
      problem.shares = at_most(panels, (threads - 1) / (s.groups * problem.chunks) + 1);
    }
  }
  T* sums = static_cast<T*>(scratch(kWeightSlot, problem.chunks * size * sizeof(T)));
  const BiasSums<T> bias(problem.p, problem.chunks);
  const int64_t pieces = problem.chunks * s.groups * problem.shares, blocks = problem.blocks();
  const int64_t work = blocks * problem.cut.size[1] * problem.cut.size[2] * group_size / pieces + 1;
  parallel(pieces, kGrain / work + 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t share = i % problem.shares, group = i / problem.shares % s.groups;
      const int64_t chunk = i / problem.shares / s.groups;
      const int64_t first = panels * share / problem.shares, past = panels * (share + 1) / problem.shares;
      T* to = sums + chunk * size + group * group_size + first * kTileCols<T> * problem.depth;
      std::memset(to, 0, static_cast<size_t>((past - first) * kTileCols<T> * problem.depth) * sizeof(T));
      for (int64_t b = blocks * chunk / problem.chunks; b < blocks * (chunk + 1) / problem.chunks; ++b) {
        const int64_t image = b / problem.cut.count(), index = b % problem.cut.count();
        accumulate<T, S>(problem, image, problem.cut.block(index), group, first, past, to, bias.piece(chunk));
      }
    }
  });
  const int64_t share = problem.chunks * kTileCols<T> * problem.depth;  // elements that one panel's end reads
  parallel(s.groups * panels, kGrain / share + 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t group = i / panels, panel = i % panels;
      write<T, S>(problem, group, panel, sums + group * group_size + panel * kTileCols<T> * problem.depth, size);
    }
  });
  bias.template write<S>();
}

}  // namespace

void conv_grad_weight(const ConvGradWeight& p) {
  const ConvShape& s = p.shape;
  if (s.groups > 1 && s.in_channels == 1) return depthwise_grad_weight(p);
  Problem problem{p,
                  {forward_axis(s, 0), forward_axis(s, 1), forward_axis(s, 2)},
                  strides_of(s.channels_last, s.groups * s.in_channels, s.in),
                  strides_of(s.channels_last, s.groups * s.out_channels, s.out),
                  {},
                  s.kernel[0] * s.kernel[1] * s.kernel[2],
                  s.kernel[0] * s.kernel[1] * s.kernel[2] * s.in_channels,
                  1,
                  1};
  if (product_grad_weight(p, problem.axes)) return;
  if (winograd_grad_weight(p, problem.axes) || planes_grad_weight(p, problem.axes)) return;
  with_storage(s.dtype, [&](auto kind) { grad_weight<Compute<decltype(kind)>, decltype(kind)>(problem); });
}

}  // namespace fastnets::FASTNETS_ISA

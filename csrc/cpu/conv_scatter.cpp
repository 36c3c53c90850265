// Convolution backwards to an input of few channels, whose lanes a gather would leave empty, and whose taps a stride
// would part: a matrix product takes every pixel of the source to all that it adds to the results (taps by channels),
// which are then added up where they belong. (im2col backwards; a block of it at a time, in the nearest caches.)
#include "planes.h"

namespace fastnets::FASTNETS_ISA {
namespace {

constexpr int64_t kMostChannels = 4, kLeastDepth = 16;
constexpr int64_t kMostTurned = 64;               // channels of the source, for lanes that are pixels instead
constexpr int64_t kBlockPixels = 10 * kTileRows;  // of the source, multiplied at once
constexpr int64_t kApart = 8;                     // pixels

template <class T, class S>
struct Scatter {
  const Phase& phase;
  const ConvGather& p = phase.p;
  const ConvShape& s = p.shape;
  const int64_t channels = phase.channels, depth = phase.source_channels;
  const int64_t run = s.kernel[2] * channels, columns = round_up(s.kernel[1] * run, kTileCols<T>);
  const int64_t reach = (s.out[2] - 1) * s.stride[2] + s.kernel[2], extent = s.in[2] + s.padding[2];
  const int64_t line = (reach > extent ? reach : extent) * channels;  // of sums, padding and all

  // packed[panel][source channel][column]: the columns are [kernel row][kernel column][channel].
  void pack(const S* weight, T* packed) const {
    std::memset(packed, 0, static_cast<size_t>(columns * depth) * sizeof(T));
    for (int64_t column = 0; column < s.kernel[1] * run; ++column) {
      const S* from = weight + column / run * s.weight_strides[3] +
                      column / channels % s.kernel[2] * s.weight_strides[4] + column % channels * phase.result_stride;
      T* to = packed + column / kTileCols<T> * kTileCols<T> * depth + column % kTileCols<T>;
      for (int64_t k = 0; k < depth; ++k) to[k * kTileCols<T>] = to_float(from[k * phase.source_stride]);
    }
  }

  // Rows [begin, end) of one image's results.
  void rows(int64_t image, int64_t group, int64_t begin, int64_t end, const T* weight) const {
    const int64_t rows = at_most((kBlockPixels + s.out[2] - 1) / s.out[2], s.out[1]), most = rows * s.out[2];
    T* sums = static_cast<T*>(scratch(kSumSlot, ((end - begin) * line + kLanes<T>)*sizeof(T)));
    T* packed = static_cast<T*>(scratch(kStageSlot, packed_rows_size(most, depth) * sizeof(T)));
    T* products = static_cast<T*>(scratch(kTransformSlot, most * columns * sizeof(T)));
    std::memset(sums, 0, static_cast<size_t>((end - begin) * line + kLanes<T>) * sizeof(T));
    const S* source = static_cast<const S*>(p.source) + image * s.groups * depth * s.out[1] * s.out[2] +
                      group * depth * phase.source.channel;
    const int64_t past = at_most((end - 1 + s.padding[1]) / s.stride[1] + 1, s.out[1]);
    int64_t y = positive_ceil(begin + s.padding[1] - (s.kernel[1] - 1) * s.dilation[1], s.stride[1]);
    for (; y < past; y += rows) {
      const int64_t pixels = at_most(rows, past - y) * s.out[2];
      pack_rows<T>(View<S>{source + y * phase.source.at[1], phase.source.at[2], phase.source.channel}, pixels, depth,
                   packed);
      multiply_packed<T>(pixels, columns, depth, packed, weight, products, columns, false);
      add(products, y, pixels / s.out[2], begin, end, sums);
    }
    write(image, group, begin, end, sums);
  }

 private:
  // The products of `rows` rows of the source from y, to the results' rows [begin, end). Neighbours in a row overlap:
  // all rows and taps come between them, as a load of what was stored in part a moment ago would wait for it.
  void add(const T* products, int64_t y, int64_t rows, int64_t begin, int64_t end, T* sums) const {
    for (int64_t start = 0; start < kApart; ++start) {
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t tap = 0; tap < s.kernel[1]; ++tap) {
          const int64_t row = (y + i) * s.stride[1] + tap * s.dilation[1] - s.padding[1];
          if (row < begin || row >= end) continue;
          const T* product = products + (i * s.out[2] + start) * columns + tap * run;
          T* to = sums + (row - begin) * line + start * s.stride[2] * channels;
          for (int64_t x = start; x < s.out[2]; x += kApart) {
            int64_t c = 0;
            for (; c + kLanes<T> <= run; c += kLanes<T>) store(to + c, load(to + c) + load(product + c));
            // Past the run nothing is added; a partial store is slower.
            if (c < run) store(to + c, load(to + c) + load_partial(product + c, static_cast<int>(run - c)));
            product += kApart * columns, to += kApart * s.stride[2] * channels;
          }
        }
      }
    }
  }

  void write(int64_t image, int64_t group, int64_t begin, int64_t end, const T* sums) const {
    const Strides& result = phase.result;
    const Finish<T, S> finish{phase, {}, 0, 0};
    for (int64_t row = begin; row < end; ++row, sums += line) {
      for (int64_t c = 0; c < channels; ++c) {
        const int64_t channel = group * channels + c;
        const T bias = p.bias ? T(to_float(static_cast<const S*>(p.bias)[channel])) : T(0);
        const int64_t to =
            image * s.groups * channels * s.in[1] * s.in[2] + channel * result.channel + row * result.at[1];
        for (int64_t i = 0; i < s.in[2]; i += kLanes<T>) {
          const int n = static_cast<int>(at_most(kLanes<T>, s.in[2] - i));
          finish.write(load_apart(sums + (s.padding[2] + i) * channels + c, n, channels) + bias, to + i * result.at[2],
                       n, result.at[2]);
        }
      }
    }
  }
};

template <class T, class S>
void scatter(const Phase& phase) {
  const Scatter<T, S> of{phase};
  const ConvShape& s = phase.p.shape;
  const int64_t size = of.columns * of.depth, images = s.batch * s.groups;
  T* packed = static_cast<T*>(scratch(kWeightSlot, s.groups * size * sizeof(T)));
  for (int64_t g = 0; g < s.groups; ++g) {
    of.pack(static_cast<const S*>(phase.p.weight) + g * phase.group_stride, packed + g * size);
  }
  const int64_t near = s.in[1] * of.line * static_cast<int64_t>(sizeof(T)) / kStageBytes + 1;
  const int64_t fed = (thread_count() + images - 1) / images, wanted = near > fed ? near : fed;
  const int64_t rows = (s.in[1] + wanted - 1) / wanted, cuts = (s.in[1] + rows - 1) / rows;
  parallel(images * cuts, kGrain / (s.out[1] * s.out[2] * size / cuts + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t image = i / cuts / s.groups, group = i / cuts % s.groups, row = i % cuts * rows;
      of.rows(image, group, row, at_most(row + rows, s.in[1]), packed + group * size);
    }
  });
}

}  // namespace

bool scatter_pays(const ConvShape& s) {
  const int64_t columns = s.kernel[1] * s.kernel[2] * s.in_channels;
  // Lanes that are pixels serve three times three taps better, channels last too: of 64x32x32x32 to 3 channels 860 us,
  // where this takes 1365. Of 8x256x32x32, staged a few rows at a time, they take 1400 us, and this 890.
  const auto square = [&](int d) { return s.kernel[d] == 3 && s.stride[d] == 1 && s.dilation[d] == 1; };
  if (kVectorBytes == 64 && square(1) && square(2) && s.in[1] >= 4 && s.in[2] >= kLanes<float> &&
      s.out_channels <= kMostTurned) {
    return false;
  }
  // Of planes without a stride no lane is empty: pixels are the lanes there.
  return (s.channels_last || s.stride[1] * s.stride[2] > 1) && s.in[0] == 1 && s.out[0] == 1 && s.kernel[0] == 1 &&
         s.dilation[2] == 1 && s.out[1] > 0 && s.out[2] > 0 && s.in_channels <= kMostChannels &&
         s.out_channels >= kLeastDepth && 4 * columns >= 3 * round_up(columns, kTileCols<float>);
}

void scatter_gather(const Phase& phase) {
  with_storage(phase.p.shape.dtype, [&](auto kind) { scatter<Compute<decltype(kind)>, decltype(kind)>(phase); });
}

}  // namespace fastnets::FASTNETS_ISA

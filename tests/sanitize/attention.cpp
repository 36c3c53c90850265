// Attention: every arithmetic and width of tiles, plain, general and with few queries, split and not, with each option,
// forwards, weights and backwards.
#include <array>
#include <cmath>

#include "driver.h"

namespace sanitize {
namespace {

using namespace fastnets;

struct Setting {
  const char* name;
  int64_t lq, lk;
  int64_t left = kUnlimited, right = kUnlimited, offset = 0;
  bool bottom_right = false;
  MaskKind mask = MaskKind::kNone;
  bool mask_of_queries = true;  // else one row for all
  bool float_mask = false;      // of 16-bit tensors, too
  bool slopes = false, sequences = false;
  double softcap = 0, dropout = 0;
  int64_t batch = 1, heads = 1, groups = 1;
  int64_t padding = 0;  // elements between a row's end and the next row: copies get narrower
  bool weights = false, grad_lse = false;
};

const Setting kPlain[] = {
    {.name = "causal", .lq = 70, .lk = 90, .right = 0},
    {.name = "full, odd rows", .lq = 65, .lk = 67, .padding = 1},
    {.name = "causal from the end", .lq = 33, .lk = 130, .right = 0, .bottom_right = true, .padding = 2},
};

const Setting kFew[] = {
    {.name = "one query, split", .lq = 1, .lk = 600, .heads = 2, .groups = 2},
    {.name = "three queries of grouped heads",
     .lq = 3,
     .lk = 45,
     .right = 0,
     .bottom_right = true,
     .heads = 4,
     .groups = 2},
    {.name = "one query, split, masked",
     .lq = 1,
     .lk = 530,
     .mask = MaskKind::kAdditive,
     .float_mask = true,
     .heads = 2,
     .grad_lse = true},
    {.name = "no keys", .lq = 2, .lk = 0, .grad_lse = true},
};

const Setting kGeneral[] = {
    {.name = "additive mask, soft cap",
     .lq = 40,
     .lk = 70,
     .mask = MaskKind::kAdditive,
     .softcap = 2,
     .grad_lse = true},
    {.name = "boolean mask, dropout",
     .lq = 35,
     .lk = 66,
     .mask = MaskKind::kBool,
     .dropout = 0.3,
     .heads = 2,
     .groups = 2},
    {.name = "slopes, window", .lq = 50, .lk = 75, .left = 20, .right = 3, .offset = 4, .slopes = true, .batch = 2},
    {.name = "sequences",
     .lq = 61,
     .lk = 83,
     .right = 0,
     .bottom_right = true,
     .sequences = true,
     .dropout = 0.2,
     .batch = 3},
    {.name = "weights", .lq = 37, .lk = 71, .dropout = 0.25, .weights = true, .grad_lse = true},
    {.name = "one row of mask",
     .lq = 20,
     .lk = 68,
     .mask = MaskKind::kAdditive,
     .mask_of_queries = false,
     .heads = 2,
     .padding = 1},
};

struct Arithmetic {
  const char* name;
  Dtype dtype;
  bool tf32;
  double epsilon;  // of a product's operands
};

constexpr Arithmetic kArithmetics[] = {
    {"bf16", Dtype::kBFloat16, false, 0x1p-8},
    {"fp16", Dtype::kFloat16, false, 0x1p-11},
    {"tf32", Dtype::kFloat32, true, 0x1p-11},
    {"fp32", Dtype::kFloat32, false, 0x1p-23},
};

struct Width {
  int64_t d, dv;
};

constexpr Width kWidths[] = {{40, 64}, {128, 72}, {136, 200}};

// [batch, heads, length, columns] with `padding` elements after each row.
struct Rows {
  int64_t heads, length, columns, padding;
  Tensor values;

  static Rows random(Random& random, Dtype dtype, int64_t batch, int64_t heads, int64_t length, int64_t columns,
                     int64_t padding, double largest) {
    const int64_t pitch = columns + padding;
    return {heads, length, columns, padding,
            random.tensor(dtype, std::max<int64_t>(batch * heads * length * pitch - padding, 0), -largest, largest)};
  }
  static Rows empty(Dtype dtype, int64_t batch, int64_t heads, int64_t length, int64_t columns) {
    return {heads, length, columns, 0, Tensor(dtype, batch * heads * length * columns)};
  }
  int64_t at(int64_t b, int64_t h, int64_t i) const { return ((b * heads + h) * length + i) * (columns + padding); }
  AttentionArray array() const {
    const int64_t row = columns + padding;
    return {values.data(), heads * length * row, length * row, row};
  }
};

// Philox 4x32-10 (Salmon et al. 2011), as fastnets/reference/attention.py asks it.
bool stays(double dropout, const std::array<int64_t, 2>& seed, int64_t b, int64_t h, int64_t i, int64_t j) {
  std::array<uint32_t, 4> c = {uint32_t(j / 64 * 16 + j % 16), uint32_t(i), uint32_t(h), uint32_t(b)};
  std::array<uint32_t, 2> key = {uint32_t(seed[0]), uint32_t(seed[1])};
  for (int round = 0; round < 10; ++round) {
    const uint64_t x = uint64_t{0xD2511F53u} * c[0], y = uint64_t{0xCD9E8D57u} * c[2];
    c = {uint32_t(y >> 32) ^ c[1] ^ key[0], uint32_t(y), uint32_t(x >> 32) ^ c[3] ^ key[1], uint32_t(x)};
    key = {key[0] + 0x9E3779B9u, key[1] + 0xBB67AE85u};
  }
  return c[j % 64 / 16] >> 8 >= std::rint(dropout * 0x1p24);
}

constexpr char kNaN = '\xff';  // in every byte of a workspace

// One call: its tensors, the kernels' results, and the truth.
class Call {
 public:
  Call(const Setting& s, const Arithmetic& arithmetic, const Width& width) : s(s), a(arithmetic) {
    Random random;
    const int64_t memory = s.sequences ? 1 : s.batch, kv_heads = s.heads / s.groups;
    q = Rows::random(random, a.dtype, memory, s.heads, s.lq, width.d, s.padding, 1);
    k = Rows::random(random, a.dtype, memory, kv_heads, s.lk, width.d, s.padding, 1);
    v = Rows::random(random, a.dtype, memory, kv_heads, s.lk, width.dv, s.padding, 1);
    grad_out = Rows::random(random, a.dtype, memory, s.heads, s.lq, width.dv, s.padding, 1);
    out = Rows::empty(a.dtype, memory, s.heads, s.lq, width.dv);
    grad_q = Rows::empty(a.dtype, memory, s.heads, s.lq, width.d);
    grad_k = Rows::empty(a.dtype, memory, kv_heads, s.lk, width.d);
    grad_v = Rows::empty(a.dtype, memory, kv_heads, s.lk, width.dv);
    lse = Tensor(Dtype::kFloat32, memory * s.heads * s.lq);
    grad_lse = random.tensor(Dtype::kFloat32, lse.size(), -1, 1);
    slopes = random.tensor(Dtype::kFloat32, s.batch * s.heads, 0, 0.1);
    mask_rows = s.mask_of_queries ? s.lq : 1;
    const Dtype mask_dtype = s.float_mask ? Dtype::kFloat32 : a.dtype;
    added = random.tensor(mask_dtype, mask_rows * s.lk, -1, 1);
    grad_mask = Tensor(mask_dtype, mask_rows * s.lk);
    seen = random.booleans(mask_rows * s.lk, 0.7);
    if (mask_rows > 1) {  // an empty row
      for (int64_t j = 0; j < s.lk; ++j) added.set(j, -INFINITY), seen[j] = 0;
    }
    const int64_t count = s.weights ? s.heads * s.lq * s.lk : 0;
    weights = Tensor(a.dtype, count);
    grad_weights = random.tensor(a.dtype, count, -1, 1);
    scale = 0.6 / std::sqrt(double(width.d));
    if (s.sequences) {  // of many lengths, one of no query
      starts_q = {0, s.lq / 3, s.lq / 3, s.lq};
      starts_k = {0, s.lk / 4, s.lk / 2, s.lk};
    }
    find_truth();
  }

  void run_forward() {
    for (Tensor* result : {&out.values, &lse, &weights}) result->forget();
    AttentionForward forward{};
    fill(forward);
    forward.out = out.array();
    forward.lse = lse.data();
    std::vector<char> workspace(cuda::attention_workspace(forward), kNaN);
    cuda::attention_forward(forward, workspace.data(), nullptr);
    if (s.weights) {
      AttentionWeights request{};
      fill(request);
      request.lse = lse.data();
      request.weights = weights.data();
      cuda::attention_weights(request, nullptr);
    }
  }

  void run_backward(bool deterministic) {
    AttentionBackward backward{};
    fill(backward);
    backward.grad_out = grad_out.array(), backward.out = out.array();
    backward.lse = lse.data();
    const Tensor inner = with_inner();
    if (s.grad_lse) backward.grad_lse = inner.data();
    if (s.weights) backward.grad_weights = grad_weights.data();
    for (Tensor* gradient : {&grad_q.values, &grad_k.values, &grad_v.values, &grad_mask}) gradient->forget();
    backward.grad_q = grad_q.array(), backward.grad_k = grad_k.array(), backward.grad_v = grad_v.array();
    backward.splits = 1;
    backward.deterministic = deterministic;
    if (s.mask == MaskKind::kAdditive) {
      backward.grad_mask = grad_mask.data();
      const int64_t sizes[] = {1, 1, mask_rows, s.lk};
      std::copy(sizes, sizes + 4, backward.mask_sizes);
    }
    std::vector<char> workspace(cuda::attention_workspace(backward), kNaN);
    cuda::attention_backward(backward, workspace.data(), nullptr);
  }

  void find_truth() {
    true_out.assign(out.values.size(), 0);
    true_lse.assign(lse.size(), -INFINITY);
    true_weights.assign(weights.size(), 0);
    dq.assign(grad_q.values.size(), 0), dk.assign(grad_k.values.size(), 0), dv.assign(grad_v.values.size(), 0);
    dmask.assign(grad_mask.size(), 0);
    for (int64_t b = 0; b < s.batch; ++b) {
      const int64_t memory = s.sequences ? 0 : b;
      const int64_t q0 = s.sequences ? starts_q[b] : 0, q1 = s.sequences ? starts_q[b + 1] : s.lq;
      const int64_t k0 = s.sequences ? starts_k[b] : 0, lk = s.sequences ? starts_k[b + 1] - k0 : s.lk;
      for (int64_t h = 0; h < s.heads; ++h) {
        for (int64_t i = 0; i < q1 - q0; ++i) {
          const int64_t row = q0 + i, offset = s.bottom_right ? lk - (q1 - q0) : s.offset;
          const int64_t row_q = q.at(memory, h, row), row_out = out.at(memory, h, row);
          const int64_t row_lse = (memory * s.heads + h) * s.lq + row;
          std::vector<double> scores(lk, -INFINITY), slope(lk, 1.0);
          double max = -INFINITY, sum = 0;
          for (int64_t j = 0; j < lk; ++j) {
            const int64_t at = (s.mask_of_queries ? i : 0) * lk + j;
            if (j < i + offset - s.left || j > i + offset + s.right) continue;
            if (s.mask == MaskKind::kBool && !seen[at]) continue;
            double dot = 0;
            for (int64_t c = 0; c < q.columns; ++c) dot += q.values[row_q + c] * key(k, memory, h, k0 + j, c);
            scores[j] = dot * scale;
            if (s.softcap != 0) {
              const double t = std::tanh(scores[j] / s.softcap);
              scores[j] = s.softcap * t;
              slope[j] = 1 - t * t;
            }
            if (s.mask == MaskKind::kAdditive) scores[j] += added[at];
            if (s.slopes) scores[j] -= slopes[b * s.heads + h] * std::fabs(double(i + offset - j));
            max = std::fmax(max, scores[j]);
          }
          if (max == -INFINITY) continue;  // a row that sees nothing: zeros
          for (const double score : scores) sum += std::exp(score - max);
          true_lse[row_lse] = (max + std::log(sum)) / std::log(2.0);
          std::vector<double> p(lk), kept(lk, 1.0), dp(lk);
          double subtract = s.grad_lse ? -grad_lse[row_lse] : 0;
          for (int64_t j = 0; j < lk; ++j) {
            p[j] = std::exp(scores[j] - max) / sum;
            if (s.dropout != 0) kept[j] = stays(s.dropout, seed, b, h, i, j) / (1 - s.dropout);
            const int64_t at = (h * s.lq + i) * lk + j;
            if (s.weights) true_weights[at] = p[j] * kept[j], dp[j] = grad_weights[at];
            for (int64_t c = 0; c < v.columns; ++c) {
              const double g = grad_out.values[grad_out.at(memory, h, row) + c];
              true_out[row_out + c] += p[j] * kept[j] * key(v, memory, h, k0 + j, c);
              dp[j] += g * key(v, memory, h, k0 + j, c);
              dv[grad_v.at(memory, h / s.groups, k0 + j) + c] += p[j] * kept[j] * g;
            }
            dp[j] *= kept[j];
            subtract += p[j] * dp[j];
          }
          for (int64_t j = 0; j < lk; ++j) {
            const double ds = p[j] * (dp[j] - subtract), raw = ds * slope[j] * scale;
            if (s.mask == MaskKind::kAdditive) dmask[(s.mask_of_queries ? i : 0) * lk + j] += ds;
            for (int64_t c = 0; c < q.columns; ++c) {
              dq[grad_q.at(memory, h, row) + c] += raw * key(k, memory, h, k0 + j, c);
              dk[grad_k.at(memory, h / s.groups, k0 + j) + c] += raw * q.values[row_q + c];
            }
          }
        }
      }
    }
  }

  void compare() const {
    expect_near("out", out.values, true_out);
    expect_near("lse", lse, true_lse);
    if (s.weights) expect_near("weights", weights, true_weights);
  }

  void compare_gradients() const {
    expect_near("grad_q", grad_q.values, dq);
    expect_near("grad_k", grad_k.values, dk);
    expect_near("grad_v", grad_v.values, dv);
    if (s.mask == MaskKind::kAdditive) expect_near("grad_mask", grad_mask, dmask);
  }

 private:
  double key(const Rows& x, int64_t memory, int64_t head, int64_t j, int64_t c) const {
    return x.values[x.at(memory, head / s.groups, j) + c];
  }

  // Rounded operands, weights and results; some of these sums are of opposite signs.
  void expect_near(const char* what, const Tensor& ours, const std::vector<double>& truth) const {
    double largest = 1;
    for (const double value : truth) largest = std::isfinite(value) ? std::fmax(largest, std::fabs(value)) : largest;
    expect_close(what, ours, truth, (8 * a.epsilon + 0x1p-18) * largest);
  }

  // The gradient of lse as the kernels want it: less what every row's weights' gradient is on average
  // (fastnets/ops/attention.py).
  Tensor with_inner() const {
    Tensor result(Dtype::kFloat32, lse.size());
    for (int64_t row = 0; row < lse.size(); ++row) {
      double sum = grad_lse[row];
      for (int64_t at = row * s.lk; s.weights && at < (row + 1) * s.lk; ++at) sum -= weights[at] * grad_weights[at];
      result.set(row, sum);
    }
    return result;
  }

  void fill(Attention& p) const {
    p.dtype = a.dtype, p.tf32 = a.tf32;
    p.q = q.array(), p.k = k.array(), p.v = v.array();
    p.batch = s.batch, p.heads = s.heads, p.groups = s.groups;
    p.lq = s.lq, p.lk = s.lk, p.d = q.columns, p.dv = v.columns;
    p.mask_kind = s.mask, p.mask_dtype = added.dtype();
    if (s.mask != MaskKind::kNone) {
      p.mask = s.mask == MaskKind::kBool ? static_cast<const void*>(seen.data()) : added.data();
      p.mask_strides[2] = s.mask_of_queries ? s.lk : 0;
      p.mask_strides[3] = 1;
    }
    if (s.slopes) {
      p.slopes = slopes.data();
      p.slope_strides[0] = s.heads, p.slope_strides[1] = 1;
    }
    if (s.sequences) p.starts_q = starts_q.data(), p.starts_k = starts_k.data();
    p.left = s.left, p.right = s.right, p.offset = s.offset, p.bottom_right = s.bottom_right;
    p.scale = scale, p.softcap = s.softcap, p.dropout = s.dropout;
    p.seed = seed.data();
  }

  const Setting& s;
  const Arithmetic& a;
  Rows q, k, v, out, grad_out, grad_q, grad_k, grad_v;
  Tensor lse, grad_lse, slopes, added, grad_mask, weights, grad_weights;
  std::vector<double> true_out, true_lse, true_weights, dq, dk, dv, dmask;
  std::vector<uint8_t> seen;
  std::vector<int64_t> starts_q, starts_k;
  std::array<int64_t, 2> seed = {123456789, 987654321};
  int64_t mask_rows;
  double scale;
};

}  // namespace

// Each arithmetic and width with a plain setting, one of few queries and two general ones, others each time.
void add_cases(Cases& cases) {
  for (size_t i = 0; i < std::size(kArithmetics); ++i) {
    for (size_t w = 0; w < std::size(kWidths); ++w) {
      const Arithmetic& arithmetic = kArithmetics[i];
      const Width& width = kWidths[w];
      const size_t turn = i + w;
      for (const Setting* setting :
           {&kPlain[turn % std::size(kPlain)], &kFew[turn % std::size(kFew)], &kGeneral[2 * turn % std::size(kGeneral)],
            &kGeneral[(2 * turn + 1) % std::size(kGeneral)]}) {
        cases.add(std::string(arithmetic.name) + ", d " + std::to_string(width.d) + ", " + setting->name,
                  [=, kept = std::shared_ptr<Call>()]() mutable {
                    if (kept == nullptr)
                      kept = std::make_shared<Call>(*setting, arithmetic, width);  // for every schedule
                    Call& call = *kept;
                    call.run_forward();
                    call.compare();
                    for (const bool deterministic : {true, false}) {
                      call.run_backward(deterministic);
                      call.compare_gradients();
                    }
                  });
      }
    }
  }
}

}  // namespace sanitize

// The program of one family: FAMILY [--match TEXT] [--seeds N] [--remove NUMBER] runs its cases in N schedules and
// exits with 1 where a value is wrong, with 3 where the SIMT device objects. See ../sanitizers.py.
#include "driver.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>

#include "mutant.h"

namespace sanitize {
namespace {

class Mismatch : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

}  // namespace

const char* name_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat32: return "float32";
    case Dtype::kFloat64: return "float64";
    case Dtype::kBFloat16: return "bfloat16";
    case Dtype::kFloat16: return "float16";
  }
  __builtin_unreachable();
}

double epsilon(Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat32: return std::ldexp(1.0, -23);
    case Dtype::kFloat64: return std::ldexp(1.0, -52);
    case Dtype::kBFloat16: return std::ldexp(1.0, -7);
    case Dtype::kFloat16: return std::ldexp(1.0, -10);
  }
  __builtin_unreachable();
}

namespace {

size_t width(Dtype dtype) { return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2; }

}  // namespace

void Tensor::Free::operator()(void* p) const { std::free(p); }

Tensor::Tensor(Dtype dtype, int64_t count, int64_t skipped) : dtype_(dtype), count_(count), skipped_(skipped) {
  const size_t bytes = (count + skipped) * width(dtype);
  void* p = nullptr;
  if (posix_memalign(&p, 32, bytes > 0 ? bytes : 1) != 0) throw std::bad_alloc();
  memory_.reset(p);
  forget();
}

void Tensor::forget() {
  if (memory_ != nullptr) std::memset(memory_.get(), 0xff, (count_ + skipped_) * width(dtype_));
}

void* Tensor::at(int64_t i) const { return static_cast<char*>(memory_.get()) + (skipped_ + i) * width(dtype_); }

double Tensor::operator[](int64_t i) const {
  switch (dtype_) {
    case Dtype::kFloat32: return *static_cast<const float*>(at(i));
    case Dtype::kFloat64: return *static_cast<const double*>(at(i));
    case Dtype::kBFloat16: return fastnets::to_float(*static_cast<const fastnets::BFloat16*>(at(i)));
    case Dtype::kFloat16: return fastnets::to_float(*static_cast<const fastnets::Float16*>(at(i)));
  }
  __builtin_unreachable();
}

void Tensor::set(int64_t i, double value) {
  const float single = static_cast<float>(value);
  switch (dtype_) {
    case Dtype::kFloat32: *static_cast<float*>(at(i)) = single; return;
    case Dtype::kFloat64: *static_cast<double*>(at(i)) = value; return;
    case Dtype::kBFloat16:
      *static_cast<fastnets::BFloat16*>(at(i)) = fastnets::from_float<fastnets::BFloat16>(single);
      return;
    case Dtype::kFloat16:
      *static_cast<fastnets::Float16*>(at(i)) = fastnets::from_float<fastnets::Float16>(single);
      return;
  }
}

// SplitMix64 (Steele, Lea, Flood 2014).
uint64_t Random::next() {
  uint64_t z = state_ += 0x9e3779b97f4a7c15u;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
  z = (z ^ z >> 27) * 0x94d049bb133111ebu;
  return z ^ z >> 31;
}

double Random::uniform(double low, double high) { return low + (high - low) * std::ldexp(double(next() >> 11), -53); }

int64_t Random::integer(int64_t low, int64_t high) { return low + static_cast<int64_t>(next() % (high - low + 1)); }

Tensor Random::tensor(Dtype dtype, int64_t count, double low, double high, int64_t skipped) {
  Tensor t(dtype, count, skipped);
  for (int64_t i = 0; i < count; ++i) t.set(i, uniform(low, high));
  return t;
}

std::vector<uint8_t> Random::booleans(int64_t count, double share_of_true) {
  std::vector<uint8_t> values(count);
  for (uint8_t& value : values) value = uniform(0, 1) < share_of_true;
  return values;
}

void expect_close(const char* what, const Tensor& ours, const std::vector<double>& truth, double tolerance) {
  expect(static_cast<size_t>(ours.size()) == truth.size(), std::string(what) + ": another size than the truth");
  for (int64_t i = 0; i < ours.size(); ++i) {
    if (ours[i] == truth[i] || std::fabs(ours[i] - truth[i]) <= tolerance) continue;  // the same infinity is right
    char text[160];
    std::snprintf(text, sizeof text, "%s[%lld] is %.9g instead of %.9g (within %.1e)", what, static_cast<long long>(i),
                  ours[i], truth[i], tolerance);
    throw Mismatch(text);
  }
}

void expect(bool holds, const std::string& what) {
  if (!holds) throw Mismatch(what);
}

}  // namespace sanitize

int main(int count, char** arguments) {
  std::string match;
  uint64_t seeds = 1;
  for (int i = 1; i + 1 < count; i += 2) {
    const std::string name = arguments[i], value = arguments[i + 1];
    if (name == "--match") match = value;
    if (name == "--seeds") seeds = std::stoull(value);
    if (name == "--remove") mutant::removed = std::stoi(value);
  }
  sanitize::Cases cases;
  sanitize::add_cases(cases);
  size_t passed = 0;
  for (uint64_t seed = 0; seed < seeds; ++seed) {
    simt::set_seed(seed);
    for (const auto& [name, run] : cases.all()) {
      if (name.find(match) == std::string::npos) continue;
      try {
        run();
        passed += 1;
      } catch (const sanitize::Mismatch& wrong) {
        std::printf("%s, schedule %llu: %s\n", name.c_str(), static_cast<unsigned long long>(seed), wrong.what());
        return 1;
      } catch (const simt::Failure& failure) {
        std::printf("%s, schedule %llu: %s\n", name.c_str(), static_cast<unsigned long long>(seed), failure.what());
        return 3;
      }
    }
  }
  std::printf("%zu passed\n", passed);
  return passed > 0 ? 0 : 2;
}

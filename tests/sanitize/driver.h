// What a family's driver is made of: tensors that AddressSanitizer sees both ends of, random values that are the same
// in every run, and cases. A family is one file here, NAME.cpp, that defines add_cases: it runs every kernel of
// csrc/cuda/NAME.cu (and NAME_*.cu) with each option and compares with loops in double. Neither Python nor torch is
// there.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "cuda/launch.h"

namespace sanitize {

using fastnets::Dtype;

inline constexpr Dtype kDtypes[] = {Dtype::kFloat32, Dtype::kBFloat16, Dtype::kFloat16};

const char* name_of(Dtype dtype);
double epsilon(Dtype dtype);

// A float tensor in memory of exactly its size, aligned to 32 bytes as torch's. Elements are NaN until they are set.
class Tensor {
 public:
  Tensor() = default;
  // The first element lies `skipped` elements behind the aligned address.
  Tensor(Dtype dtype, int64_t count, int64_t skipped = 0);

  Dtype dtype() const { return dtype_; }
  int64_t size() const { return count_; }
  void* data() const { return count_ > 0 ? at(0) : nullptr; }
  double operator[](int64_t i) const;
  void set(int64_t i, double value);  // rounded to the dtype
  void forget();                      // all elements are NaN again

 private:
  void* at(int64_t i) const;
  struct Free {
    void operator()(void* p) const;
  };
  Dtype dtype_{};
  int64_t count_ = 0, skipped_ = 0;
  std::unique_ptr<void, Free> memory_;
};

class Random {
 public:
  double uniform(double low, double high);
  int64_t integer(int64_t low, int64_t high);  // both ends included
  Tensor tensor(Dtype dtype, int64_t count, double low, double high, int64_t skipped = 0);
  std::vector<uint8_t> booleans(int64_t count, double share_of_true);

 private:
  uint64_t next();
  uint64_t state_ = 1;
};

// Throws unless every element lies within `tolerance` of the truth.
void expect_close(const char* what, const Tensor& ours, const std::vector<double>& truth, double tolerance);
void expect(bool holds, const std::string& what);

class Cases {
 public:
  void add(std::string name, std::function<void()> run) { cases_.push_back({std::move(name), std::move(run)}); }
  struct Case {
    std::string name;
    std::function<void()> run;
  };
  const std::vector<Case>& all() const { return cases_; }

 private:
  std::vector<Case> cases_;
};

void add_cases(Cases& cases);  // the family's own

}  // namespace sanitize

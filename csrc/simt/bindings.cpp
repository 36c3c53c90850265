// fastnets._simt: control of the SIMT device and its counters, for tests and `inspect`. Importing it registers the
// operators torch.ops.fastnets_simt.
#include <dlfcn.h>
#include <pybind11/pybind11.h>

#include "device.h"

namespace py = pybind11;

namespace {

py::dict counters() {
  py::dict kernels;
  for (const auto& [name, of_kernel] : simt::counters()) {
    py::dict values;
#define FASTNETS_SIMT_ENTRY(field) values[#field] = of_kernel.field;
    FASTNETS_SIMT_COUNTERS(FASTNETS_SIMT_ENTRY)
#undef FASTNETS_SIMT_ENTRY
    kernels[py::str(name)] = values;
  }
  return kernels;
}

// A kernel is named by its place in this library, as `nm` prints it.
py::list launched() {
  py::list launches;
  for (const simt::Launched& launch : simt::launched()) {
    Dl_info library;
    if (dladdr(launch.kernel, &library) == 0) continue;  // a kernel of nobody's
    const auto place = static_cast<const char*>(launch.kernel) - static_cast<const char*>(library.dli_fbase);
    launches.append(py::make_tuple(place, launch.threads, launch.shared));
  }
  return launches;
}

}  // namespace

PYBIND11_MODULE(_simt, m) {
  m.doc() = "The SIMT device: runs the CUDA kernels on the CPU, thread by thread.";
  m.def("set_seed", &simt::set_seed, py::arg("seed"),
        "0 runs blocks and threads in order; every other seed is another order.");
  m.def("set_counting", &simt::set_counting, py::arg("on"), "Whether launches are counted; it makes them slower.");
  m.def("counters", &counters, "{kernel: {counter: value}} since reset_counters(); see csrc/simt/runtime.h.");
  m.def("launched", &launched,
        "[(kernel, threads in a block, bytes of dynamic shared memory)] since reset_counters(), each once; a kernel is "
        "its "
        "address in this library.");
  m.def("largest_grid", [] { return simt::largest_grid; }, "The most blocks of a launch since reset_counters().");
  m.def("reset_counters", &simt::reset_counters);
  m.def("multiprocessors", &simt::multiprocessors, "How many the kernels choose their tiles and shares for.");
  m.def("set_multiprocessors", &simt::set_multiprocessors, py::arg("count"));
  m.def("resident_limit", &simt::resident_limit, "The blocks that a cooperative launch may have.");
  m.def("set_resident_limit", &simt::set_resident_limit, py::arg("blocks"));
  m.def("shared_limit", &simt::shared_limit, "The bytes of shared memory that a block may have.");
  m.def("set_shared_limit", &simt::set_shared_limit, py::arg("bytes"),
        "The architecture's: 101376 on 8.6, 8.9 and 12.0, 166912 on 8.0, 232448 on 9.0 and 10.0.");
}

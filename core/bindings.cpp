// kvstrata._core: the only file of the core that knows Python.
#include <nanobind/nanobind.h>

NB_MODULE(_core, m) {
    m.doc() = "The native core of kvstrata.";
}

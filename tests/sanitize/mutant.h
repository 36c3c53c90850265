// Included before every file of a copy of the kernels in which each barrier, wait and fence has a number: the one that
// is `removed` is not executed. -1 removes none.
#pragma once

namespace mutant {
inline int removed = -1;
}

#define FASTNETS_STATEMENT(number, call) (mutant::removed == number ? void() : call)

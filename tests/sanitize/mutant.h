// Included before every file of a mutated copy, in which each barrier, wait and fence has a number: the one that is
// `removed` is not executed.
#pragma once

namespace mutant {
inline int removed = -1;
}

#define FASTNETS_STATEMENT(number, call) (mutant::removed == number ? void() : call)

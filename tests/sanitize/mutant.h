// Included before every file of a copy of the kernels in which each barrier, wait and fence has a number: the one that
// is `removed` is not executed, or another expression in its place. -1 removes none.
#pragma once

namespace mutant {
inline int removed = -1;
}

#define FASTNETS_STATEMENT(number, call) (mutant::removed == number ? void() : call)
#define FASTNETS_INSTEAD(number, expression, other) (mutant::removed == number ? other : expression)

// The version of the libraries; see library.py.

#pragma once

// Raise it with library.py's whenever the arguments of a function, or packed_layer.h, change.
constexpr int VERSION = 4;

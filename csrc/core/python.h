// pybind11, which takes longer to read than all else: included first, so that a precompiled copy can stand in for it.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

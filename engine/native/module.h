// From a plain C++ function to a Python one, without a binding library.
//
//     static void scale(float* x, int64_t n, float by) { ... }
//     KERNEL(scale);
//
// makes `kernels.scale(x.data_ptr(), n, 0.5)`. Arguments convert by their C++ type: a pointer takes
// an int (None is the null pointer), integers an int, bool a truth value, float and double a
// number. It returns None, an int or a float. The GIL is released while the function runs, so it
// must not touch Python. Nothing checks shapes here: the Python launcher beside the kernel does.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstdint>
#include <exception>
#include <tuple>
#include <type_traits>
#include <utility>

namespace module {

// One kernel of this module; all of them are linked from `first` before the module is made.
struct Entry {
    PyMethodDef method;
    const Entry* next;
    static const Entry* first;

    Entry(const char* name, _PyCFunctionFast call)
        : method{name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(call)),
                 METH_FASTCALL, nullptr},
          next(first) {
        first = this;
    }
};

template <typename T>
T from_python(PyObject* value) {
    if constexpr (std::is_pointer_v<T>) {
        if (value == Py_None) return nullptr;
        return reinterpret_cast<T>(static_cast<uintptr_t>(PyLong_AsUnsignedLongLong(value)));
    } else if constexpr (std::is_same_v<T, bool>) {
        return PyObject_IsTrue(value) == 1;
    } else if constexpr (std::is_integral_v<T>) {
        return static_cast<T>(PyLong_AsLongLong(value));
    } else {
        static_assert(std::is_floating_point_v<T>, "kernels take pointers and numbers");
        return static_cast<T>(PyFloat_AsDouble(value));
    }
}

template <auto kernel, typename Result, typename... Args, size_t... I>
PyObject* call(PyObject* const* values, Result (*)(Args...), std::index_sequence<I...>) {
    const std::tuple<Args...> args{from_python<Args>(values[I])...};
    if (PyErr_Occurred()) return nullptr;
    std::exception_ptr failed;
    [[maybe_unused]] std::conditional_t<std::is_void_v<Result>, int, Result> result{};
    Py_BEGIN_ALLOW_THREADS
    try {
        if constexpr (std::is_void_v<Result>) kernel(std::get<I>(args)...);
        else result = kernel(std::get<I>(args)...);
    } catch (...) {
        failed = std::current_exception();
    }
    Py_END_ALLOW_THREADS
    if (failed) return PyErr_NoMemory();  // all that the kernels throw is bad_alloc
    if constexpr (std::is_void_v<Result>) Py_RETURN_NONE;
    else if constexpr (std::is_integral_v<Result>) return PyLong_FromLongLong(result);
    else return PyFloat_FromDouble(result);
}

template <typename... Args, typename Result>
constexpr size_t arity(Result (*)(Args...)) { return sizeof...(Args); }

template <auto kernel>
PyObject* method(PyObject*, PyObject* const* values, Py_ssize_t count) {
    constexpr size_t expected = arity(kernel);
    if (count != static_cast<Py_ssize_t>(expected))
        return PyErr_Format(PyExc_TypeError, "takes %zu arguments, not %zd", expected, count);
    return call<kernel>(values, kernel, std::make_index_sequence<expected>{});
}

}  // namespace module

// At namespace scope, after the function: makes it callable from Python under its own name.
#define KERNEL(name) static const module::Entry entry_##name { #name, &module::method<name> }

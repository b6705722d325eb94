/* The functions of ONNX Runtime's C API that the runner calls.
 *
 * The API is a table of function pointers. New functions are only appended, so the position of a
 * function never changes: the numbers below are valid for every library with API version 12 (ONNX
 * Runtime 1.12) or later, and the build needs no header of a particular version. The types are
 * opaque; enumerations are declared as int.
 */
#ifndef NELF_ORT_FUNCTIONS_H
#define NELF_ORT_FUNCTIONS_H

#include <stddef.h>
#include <stdint.h>

#define ORT_API_VERSION 12

typedef struct OrtStatus OrtStatus; /* NULL is success */
typedef struct OrtEnv OrtEnv;
typedef struct OrtSession OrtSession;
typedef struct OrtSessionOptions OrtSessionOptions;
typedef struct OrtRunOptions OrtRunOptions;
typedef struct OrtValue OrtValue;
typedef struct OrtTypeInfo OrtTypeInfo;
typedef struct OrtTensorInfo OrtTensorInfo; /* OrtTensorTypeAndShapeInfo */
typedef struct OrtMemoryInfo OrtMemoryInfo;
typedef struct OrtAllocator OrtAllocator;

typedef void (*AnyFunction)(void);

typedef struct {
  const AnyFunction *(*GetApi)(uint32_t version); /* the table, or NULL */
  const char *(*GetVersionString)(void);
} OrtApiBase;

enum { LOG_ERRORS = 3, OPTIMIZE_ALL = 99, DEVICE_ALLOCATOR = 0, DEFAULT_MEMORY = 0 };

/* F(position, result, name, arguments) */
#define ORT_FUNCTIONS(F)                                                                            \
  F(2, const char *, GetErrorMessage, (const OrtStatus *))                                          \
  F(3, OrtStatus *, CreateEnv, (int severity, const char *name, OrtEnv **))                         \
  F(7, OrtStatus *, CreateSession,                                                                  \
    (const OrtEnv *, const char *path, const OrtSessionOptions *, OrtSession **))                   \
  F(9, OrtStatus *, Run,                                                                            \
    (OrtSession *, const OrtRunOptions *, const char *const *input_names,                           \
     const OrtValue *const *inputs, size_t input_count, const char *const *output_names,            \
     size_t output_count, OrtValue **outputs))                                                      \
  F(10, OrtStatus *, CreateSessionOptions, (OrtSessionOptions **))                                  \
  F(14, OrtStatus *, EnableProfiling, (OrtSessionOptions *, const char *file_prefix))               \
  F(23, OrtStatus *, SetSessionGraphOptimizationLevel, (OrtSessionOptions *, int))                  \
  F(24, OrtStatus *, SetIntraOpNumThreads, (OrtSessionOptions *, int))                              \
  F(25, OrtStatus *, SetInterOpNumThreads, (OrtSessionOptions *, int))                              \
  F(30, OrtStatus *, SessionGetInputCount, (const OrtSession *, size_t *))                          \
  F(31, OrtStatus *, SessionGetOutputCount, (const OrtSession *, size_t *))                         \
  F(33, OrtStatus *, SessionGetInputTypeInfo, (const OrtSession *, size_t, OrtTypeInfo **))         \
  F(36, OrtStatus *, SessionGetInputName, (const OrtSession *, size_t, OrtAllocator *, char **))    \
  F(37, OrtStatus *, SessionGetOutputName, (const OrtSession *, size_t, OrtAllocator *, char **))   \
  F(49, OrtStatus *, CreateTensorWithDataAsOrtValue,                                                \
    (const OrtMemoryInfo *, void *data, size_t size_bytes, const int64_t *shape, size_t rank,       \
     int element, OrtValue **))                                                                     \
  F(51, OrtStatus *, GetTensorMutableData, (OrtValue *, void **))                                   \
  F(55, OrtStatus *, CastTypeInfoToTensorInfo, (const OrtTypeInfo *, const OrtTensorInfo **))       \
  F(60, OrtStatus *, GetTensorElementType, (const OrtTensorInfo *, int *))                          \
  F(61, OrtStatus *, GetDimensionsCount, (const OrtTensorInfo *, size_t *))                         \
  F(62, OrtStatus *, GetDimensions, (const OrtTensorInfo *, int64_t *, size_t))                     \
  F(65, OrtStatus *, GetTensorTypeAndShape, (const OrtValue *, OrtTensorInfo **))                   \
  F(69, OrtStatus *, CreateCpuMemoryInfo, (int allocator, int memory, OrtMemoryInfo **))            \
  F(78, OrtStatus *, GetAllocatorWithDefaultOptions, (OrtAllocator **))                             \
  F(96, void, ReleaseValue, (OrtValue *))                                                           \
  F(110, OrtStatus *, SessionEndProfiling, (OrtSession *, OrtAllocator *, char **file))             \
  F(125, OrtStatus *, GetAvailableProviders, (char ***names, int *count))                           \
  F(130, OrtStatus *, AddSessionConfigEntry, (OrtSessionOptions *, const char *, const char *))     \
  F(216, OrtStatus *, SessionOptionsAppendExecutionProvider,                                        \
    (OrtSessionOptions *, const char *name, const char *const *keys, const char *const *values,     \
     size_t count))

#endif

/* Runs ONNX graphs and reports how long every run took.
 *
 *   nelf_runner --library LIBONNXRUNTIME --threads N --warmup N --runs N --limit SECONDS
 *               [--seconds N] [--provider NAME (--option KEY=VALUE)...] [--profile PREFIX]
 *               (--watch FILE)... (--model PATH --inputs FOLDER [--outputs FOLDER])...
 *
 * device/runner_protocol.py describes the protocol: order of runs, files, report, exit codes. The
 * program uses plain C and few functions of the C library, so that it can be linked against
 * Android's C library with nothing but the names of the functions. It does not use `errno`, whose
 * symbol differs on Android.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "ort_functions.h"

enum { MAX_MODELS = 512, MAX_TENSORS = 32, MAX_RANK = 8, PATH_BYTES = 4096 };
enum { MAX_OPTIONS = 32, MAX_WATCHED = 64, WATCH_EVERY_US = 500000 };
enum { EXIT_USAGE = 2, EXIT_FAILURE_REPORTED = 3 };

#define DECLARE(position, result, name, arguments) static result(*name) arguments;
#define BIND(position, result, name, arguments) name = (result(*) arguments)table[position];
ORT_FUNCTIONS(DECLARE)

typedef struct {
  const char *name; /* in numpy */
  size_t bytes;
} Element;

static const Element ELEMENTS[] = {
    [1] = {"float32", 4}, [2] = {"uint8", 1},  [3] = {"int8", 1},     [6] = {"int32", 4},
    [7] = {"int64", 8},   [9] = {"bool", 1},   [10] = {"float16", 2}, [11] = {"float64", 8},
};

typedef struct {
  int64_t shape[MAX_RANK];
  size_t rank, bytes;
  int element;
} Shape;

typedef struct {
  double *values;
  size_t count, capacity;
} Numbers;

typedef struct {
  const char *path, *inputs_folder, *outputs_folder;
  OrtSession *session;
  size_t input_count, output_count;
  char *input_names[MAX_TENSORS], *output_names[MAX_TENSORS];
  OrtValue *inputs[MAX_TENSORS], *outputs[MAX_TENSORS];
  double load_us;
  Numbers at_us, wall_us, cpu_us;
} Model;

typedef struct {
  const char *library, *provider, *profile;
  char *option_keys[MAX_OPTIONS], *option_values[MAX_OPTIONS];
  const char *watched[MAX_WATCHED];
  int threads, warmup, runs, seconds, limit_seconds;
  size_t model_count, option_count, watched_count;
  Numbers readings; /* rows: time, then one value per watched file */
  Model models[MAX_MODELS];
} Request;

/* JSON out ------------------------------------------------------------------------------------- */

static void print_string(const char *text) {
  putchar('"');
  for (const unsigned char *c = (const unsigned char *)text; *c; c++) {
    if (*c == '"' || *c == '\\') printf("\\%c", *c);
    else if (*c < 0x20) printf("\\u%04x", *c);
    else putchar(*c);
  }
  putchar('"');
}

static void fail(const char *at, const char *reason) {
  printf("{\"error\": ");
  print_string(reason);
  printf(", \"at\": ");
  print_string(at);
  printf("}\n");
  exit(EXIT_FAILURE_REPORTED);
}

static void check(OrtStatus *status, const char *at) {
  if (status) fail(at, GetErrorMessage(status));
}

static void *allocate(size_t bytes) {
  void *memory = NULL;
  if (posix_memalign(&memory, 64, bytes ? bytes : 1)) fail("allocate memory", "out of memory");
  memset(memory, 0, bytes);
  return memory;
}

static void append(Numbers *numbers, double value) {
  if (numbers->count == numbers->capacity) {
    size_t capacity = numbers->capacity ? 2 * numbers->capacity : 256;
    double *values = allocate(capacity * sizeof *values);
    if (numbers->count) memcpy(values, numbers->values, numbers->count * sizeof *values);
    free(numbers->values);
    numbers->values = values;
    numbers->capacity = capacity;
  }
  numbers->values[numbers->count++] = value;
}

/* Clocks and memory ---------------------------------------------------------------------------- */

static double clock_us(clockid_t clock) {
  struct timespec now;
  clock_gettime(clock, &now);
  return (double)now.tv_sec * 1e6 + (double)now.tv_nsec / 1e3;
}

static long status_kb(const char *key) {
  char line[256];
  long value = 0;
  FILE *file = fopen("/proc/self/status", "r");
  if (!file) return 0;
  while (fgets(line, sizeof line, file))
    if (!strncmp(line, key, strlen(key))) value = strtol(line + strlen(key), NULL, 10);
  fclose(file);
  return value;
}

/* The number in a file of /sys; -1 if it cannot be read. */
static double number_in(const char *path) {
  char line[64], *end = line;
  FILE *file = fopen(path, "r");
  if (!file) return -1;
  long value = fgets(line, sizeof line, file) ? strtol(line, &end, 10) : -1;
  fclose(file);
  return end == line ? -1 : (double)value;
}

static void read_watched(Request *request, double since_us) {
  if (!request->watched_count) return;
  append(&request->readings, clock_us(CLOCK_MONOTONIC) - since_us);
  for (size_t i = 0; i < request->watched_count; i++)
    append(&request->readings, number_in(request->watched[i]));
}

/* Tensors -------------------------------------------------------------------------------------- */

static Shape shape_of(const OrtTensorInfo *info, const char *at) {
  Shape shape = {0};
  check(GetTensorElementType(info, &shape.element), at);
  check(GetDimensionsCount(info, &shape.rank), at);
  if (shape.rank > MAX_RANK) fail(at, "a tensor has more dimensions than the runner supports");
  check(GetDimensions(info, shape.shape, shape.rank), at);
  size_t kinds = sizeof ELEMENTS / sizeof *ELEMENTS;
  if (shape.element < 0 || (size_t)shape.element >= kinds || !ELEMENTS[shape.element].bytes)
    fail(at, "a tensor has an element type that the runner does not support");
  shape.bytes = ELEMENTS[shape.element].bytes;
  for (size_t i = 0; i < shape.rank; i++) {
    if (shape.shape[i] < 1) fail(at, "a tensor has a dimension that is not fixed");
    shape.bytes *= (size_t)shape.shape[i];
  }
  return shape;
}

static void tensor_path(char *path, const char *folder, size_t index) {
  int length = snprintf(path, PATH_BYTES, "%s/%zu.bin", folder, index);
  if (length < 0 || length >= PATH_BYTES) fail("open a tensor file", "the path is too long");
}

static OrtValue *read_input(const Model *model, size_t index, const OrtMemoryInfo *memory) {
  const char *at = "read an input";
  OrtTypeInfo *type;
  const OrtTensorInfo *info;
  check(SessionGetInputTypeInfo(model->session, index, &type), at);
  check(CastTypeInfoToTensorInfo(type, &info), at);
  if (!info) fail(at, "the input is not a tensor");
  Shape shape = shape_of(info, at);
  char path[PATH_BYTES];
  tensor_path(path, model->inputs_folder, index);
  void *data = allocate(shape.bytes);
  FILE *file = fopen(path, "rb");
  if (!file) fail(at, path);
  if (fread(data, 1, shape.bytes, file) != shape.bytes || fgetc(file) != EOF)
    fail(at, "the file does not have the size that the graph needs");
  fclose(file);
  OrtValue *value;
  check(CreateTensorWithDataAsOrtValue(memory, data, shape.bytes, shape.shape, shape.rank,
                                       shape.element, &value), at);
  return value;
}

static Shape output_shape(const Model *model, size_t index) {
  OrtTensorInfo *info;
  check(GetTensorTypeAndShape(model->outputs[index], &info), "read an output");
  return shape_of(info, "read an output");
}

static void write_output(const Model *model, size_t index) {
  const char *at = "write an output";
  Shape shape = output_shape(model, index);
  void *data;
  check(GetTensorMutableData(model->outputs[index], &data), at);
  char path[PATH_BYTES];
  tensor_path(path, model->outputs_folder, index);
  FILE *file = fopen(path, "wb");
  if (!file) fail(at, path);
  size_t written = fwrite(data, 1, shape.bytes, file);
  if (fclose(file) || written != shape.bytes) fail(at, "the storage is full or read-only");
}

/* Models --------------------------------------------------------------------------------------- */

static void load(Model *model, const OrtEnv *env, const OrtSessionOptions *options) {
  const char *at = "load the graph";
  double start_us = clock_us(CLOCK_MONOTONIC);
  check(CreateSession(env, model->path, options, &model->session), at);
  model->load_us = clock_us(CLOCK_MONOTONIC) - start_us;
  check(SessionGetInputCount(model->session, &model->input_count), at);
  check(SessionGetOutputCount(model->session, &model->output_count), at);
  if (model->input_count > MAX_TENSORS || model->output_count > MAX_TENSORS)
    fail(at, "the graph has more inputs or outputs than the runner supports");
  OrtAllocator *allocator;
  OrtMemoryInfo *memory;
  check(GetAllocatorWithDefaultOptions(&allocator), at);
  check(CreateCpuMemoryInfo(DEVICE_ALLOCATOR, DEFAULT_MEMORY, &memory), at);
  for (size_t i = 0; i < model->input_count; i++) {
    check(SessionGetInputName(model->session, i, allocator, &model->input_names[i]), at);
    model->inputs[i] = read_input(model, i, memory);
  }
  for (size_t i = 0; i < model->output_count; i++)
    check(SessionGetOutputName(model->session, i, allocator, &model->output_names[i]), at);
}

static void run_once(Model *model) {
  for (size_t i = 0; i < model->output_count; i++) {
    if (model->outputs[i]) ReleaseValue(model->outputs[i]);
    model->outputs[i] = NULL;
  }
  check(Run(model->session, NULL, (const char *const *)model->input_names,
            (const OrtValue *const *)model->inputs, model->input_count,
            (const char *const *)model->output_names, model->output_count, model->outputs),
        "run the graph");
}

static void time_once(Model *model, double since_us) {
  double wall = clock_us(CLOCK_MONOTONIC), cpu = clock_us(CLOCK_PROCESS_CPUTIME_ID);
  run_once(model);
  cpu = clock_us(CLOCK_PROCESS_CPUTIME_ID) - cpu; /* read both clocks before a list may grow */
  double wall_us = clock_us(CLOCK_MONOTONIC) - wall;
  append(&model->at_us, wall - since_us);
  append(&model->wall_us, wall_us);
  append(&model->cpu_us, cpu);
}

/* Run all models round-robin, as often and as long as asked; read watched files between runs. */
static void measure(Request *request) {
  double start_us = clock_us(CLOCK_MONOTONIC), watch_us = start_us, now_us = start_us;
  for (int run = 0; run < request->runs || now_us < start_us + 1e6 * request->seconds; run++) {
    if (now_us >= watch_us) {
      read_watched(request, start_us);
      watch_us = now_us + WATCH_EVERY_US;
    }
    for (size_t i = 0; i < request->model_count; i++) time_once(&request->models[i], start_us);
    now_us = clock_us(CLOCK_MONOTONIC);
  }
  read_watched(request, start_us);
}

static void print_numbers(const char *key, const Numbers *numbers) {
  printf("\"%s\": [", key);
  for (size_t i = 0; i < numbers->count; i++)
    printf("%s%.3f", i ? ", " : "", numbers->values[i]);
  printf("], ");
}

static void print_model(const Model *model) {
  printf("{\"load_us\": %.3f, ", model->load_us);
  print_numbers("at_us", &model->at_us);
  print_numbers("wall_us", &model->wall_us);
  print_numbers("cpu_us", &model->cpu_us);
  printf("\"outputs\": [");
  for (size_t i = 0; i < model->output_count; i++) {
    Shape shape = output_shape(model, i);
    printf("%s{\"name\": ", i ? ", " : "");
    print_string(model->output_names[i]);
    printf(", \"element\": \"%s\", \"shape\": [", ELEMENTS[shape.element].name);
    for (size_t k = 0; k < shape.rank; k++) printf("%s%" PRId64, k ? ", " : "", shape.shape[k]);
    printf("]}");
  }
  printf("]}");
}

/* The command line ----------------------------------------------------------------------------- */

static int number(const char *text) { return (int)strtol(text, NULL, 10); }

static int read_option(Request *request, const char *pair) {
  size_t key_bytes = 0, bytes = strlen(pair) + 1;
  while (pair[key_bytes] && pair[key_bytes] != '=') key_bytes++;
  if (!pair[key_bytes] || request->option_count == MAX_OPTIONS) return 0;
  char *copy = allocate(bytes);
  memcpy(copy, pair, bytes);
  copy[key_bytes] = 0;
  request->option_keys[request->option_count] = copy;
  request->option_values[request->option_count++] = copy + key_bytes + 1;
  return 1;
}

static int read_arguments(int count, char **words, Request *request) {
  for (int i = 1; i < count; i += 2) {
    const char *key = words[i], *value = i + 1 < count ? words[i + 1] : NULL;
    Model *last = request->model_count ? &request->models[request->model_count - 1] : NULL;
    if (!value) return 0;
    if (!strcmp(key, "--library")) request->library = value;
    else if (!strcmp(key, "--threads")) request->threads = number(value);
    else if (!strcmp(key, "--warmup")) request->warmup = number(value);
    else if (!strcmp(key, "--runs")) request->runs = number(value);
    else if (!strcmp(key, "--seconds")) request->seconds = number(value);
    else if (!strcmp(key, "--limit")) request->limit_seconds = number(value);
    else if (!strcmp(key, "--provider")) request->provider = value;
    else if (!strcmp(key, "--option")) { if (!read_option(request, value)) return 0; }
    else if (!strcmp(key, "--profile")) request->profile = value;
    else if (!strcmp(key, "--watch") && request->watched_count < MAX_WATCHED)
      request->watched[request->watched_count++] = value;
    else if (!strcmp(key, "--model") && request->model_count < MAX_MODELS)
      request->models[request->model_count++].path = value;
    else if (!strcmp(key, "--inputs") && last) last->inputs_folder = value;
    else if (!strcmp(key, "--outputs") && last) last->outputs_folder = value;
    else return 0;
  }
  for (size_t i = 0; i < request->model_count; i++)
    if (!request->models[i].inputs_folder) return 0;
  if (request->profile && request->model_count != 1) return 0; /* a profile is of one session */
  return request->library && request->threads > 0 && request->warmup >= 0 && request->runs > 0;
}

static void *open_library(const char *path, const char **version) {
  void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (!library) fail("open its library", dlerror());
  const OrtApiBase *(*get_base)(void);
  *(void **)&get_base = dlsym(library, "OrtGetApiBase");
  if (!get_base) fail("open its library", "the library does not contain OrtGetApiBase");
  const AnyFunction *table = get_base()->GetApi(ORT_API_VERSION);
  if (!table) fail("open its library", "the library is older than ONNX Runtime 1.12");
  ORT_FUNCTIONS(BIND)
  *version = get_base()->GetVersionString();
  return library;
}

/* NNAPI is the only provider with its own function, which only libraries with NNAPI export. */
static void add_nnapi(OrtSessionOptions *options, const Request *request, void *library) {
  const char *at = "add the provider nnapi";
  uint32_t flags = 0;
  OrtStatus *(*add)(OrtSessionOptions *, uint32_t);
  *(void **)&add = dlsym(library, "OrtSessionOptionsAppendExecutionProvider_Nnapi");
  if (!add) fail(at, "this library was built without it");
  for (size_t i = 0; i < request->option_count; i++)
    if (!strcmp(request->option_keys[i], "flags"))
      flags = (uint32_t)number(request->option_values[i]);
  check(add(options, flags), at);
}

static void add_provider(OrtSessionOptions *options, const Request *request, void *library) {
  const char *name = request->provider;
  if (!name || !strcmp(name, "cpu")) return;
  if (!strcmp(name, "nnapi")) add_nnapi(options, request, library);
  else if (!strcmp(name, "xnnpack") || !strcmp(name, "qnn"))
    check(SessionOptionsAppendExecutionProvider(
              options, *name == 'x' ? "XNNPACK" : "QNN", (const char *const *)request->option_keys,
              (const char *const *)request->option_values, request->option_count),
          *name == 'x' ? "add the provider xnnpack" : "add the provider qnn");
  else fail("add a provider", "the runner supports cpu, xnnpack, nnapi and qnn");
}

static OrtSessionOptions *session_options(const Request *request, void *library) {
  const char *at = "configure a session";
  OrtSessionOptions *options;
  check(CreateSessionOptions(&options), at);
  check(SetIntraOpNumThreads(options, request->threads), at);
  check(SetInterOpNumThreads(options, 1), at);
  check(SetSessionGraphOptimizationLevel(options, OPTIMIZE_ALL), at);
  check(AddSessionConfigEntry(options, "session.intra_op.allow_spinning", "0"), at);
  check(AddSessionConfigEntry(options, "session.inter_op.allow_spinning", "0"), at);
  add_provider(options, request, library);
  if (request->profile) check(EnableProfiling(options, request->profile), at);
  return options;
}

static void print_report(const Request *request, const char *version, long growth_kb) {
  char **providers;
  int provider_count;
  check(GetAvailableProviders(&providers, &provider_count), "list the providers");
  printf("{\"runtime\": ");
  print_string(version);
  printf(", \"providers\": [");
  for (int i = 0; i < provider_count; i++) {
    if (i) printf(", ");
    print_string(providers[i]);
  }
  printf("], \"growth_kb\": %ld, ", growth_kb > 0 ? growth_kb : 0);
  if (request->profile) {
    OrtAllocator *allocator;
    char *path;
    check(GetAllocatorWithDefaultOptions(&allocator), "write the profile");
    check(SessionEndProfiling(request->models[0].session, allocator, &path), "write the profile");
    printf("\"profile\": ");
    print_string(path);
    printf(", ");
  }
  print_numbers("watched", &request->readings);
  printf("\"models\": [");
  for (size_t i = 0; i < request->model_count; i++) {
    if (i) printf(", ");
    print_model(&request->models[i]);
  }
  printf("]}\n");
}

int main(int count, char **words) {
  static Request request; /* too large for the stack; all zero, so it takes no space in the file */
  const char *version;
  request.threads = request.runs = 1;
  if (!read_arguments(count, words, &request)) {
    printf("nelf_runner: wrong arguments; see device/runner_protocol.py\n");
    return EXIT_USAGE;
  }
  if (request.limit_seconds > 0) alarm((unsigned)request.limit_seconds);
  void *library = open_library(request.library, &version);
  OrtEnv *env;
  check(CreateEnv(LOG_ERRORS, "nelf", &env), "start");
  OrtSessionOptions *options = session_options(&request, library);
  long before_kb = status_kb("VmRSS:");
  Model *models = request.models;
  size_t n = request.model_count;
  for (size_t i = 0; i < n; i++) load(&models[i], env, options);
  for (size_t i = 0; i < n; i++)
    for (int run = 0; run < request.warmup; run++) run_once(&models[i]);
  if (n) measure(&request);
  long growth_kb = status_kb("VmHWM:") - before_kb;
  for (size_t i = 0; i < n; i++)
    for (size_t k = 0; models[i].outputs_folder && k < models[i].output_count; k++)
      write_output(&models[i], k);
  print_report(&request, version, growth_kb);
  fflush(NULL);
  /* Do not shut ONNX Runtime down: a crash during shutdown would hide the report. */
  _exit(0);
}

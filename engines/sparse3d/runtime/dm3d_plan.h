/* Runs launch plans of dm3d-deploy in a vehicle: no Python, no CUDA headers, nothing allocated while a plan runs.
 *
 *     dm3d_plan *plan = NULL;
 *     dm3d_plan_load(bytes, size, &plan);         checks the whole file, needs no GPU
 *     dm3d_plan_prepare(plan);                    needs the CUDA context that shall run it to be current
 *     dm3d_plan_enqueue(plan, stream, bindings, count, workspace, workspace_bytes);    may be captured by a CUDA graph
 *     dm3d_plan_status(plan, stream, bindings, count, workspace, workspace_bytes, &status);        waits for the stream
 *     dm3d_plan_destroy(plan);
 *
 * Every function but destroy returns a result; nothing throws and nothing aborts. One plan serves one thread at a time.
 */
#ifndef DM3D_PLAN_H
#define DM3D_PLAN_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define DM3D_API __attribute__((visibility("default")))
#else
#define DM3D_API
#endif

typedef struct dm3d_plan dm3d_plan;
typedef void *dm3d_stream; /* a CUstream, which a cudaStream_t is as well */

typedef enum dm3d_result {
  DM3D_OK = 0,
  DM3D_BAD_ARGUMENT = 1,  /* a null or misaligned address, a wrong count, too small a workspace */
  DM3D_BAD_PLAN = 2,      /* the file is truncated, changed or contradicts itself */
  DM3D_NEWER_PLAN = 3,    /* the file needs a newer runtime */
  DM3D_NO_IMAGE = 4,      /* the plan holds no kernels for this GPU */
  DM3D_NO_DRIVER = 5,     /* there is no usable CUDA driver or no current context */
  DM3D_DRIVER_ERROR = 6,  /* the CUDA driver refused a call */
  DM3D_OUT_OF_MEMORY = 7, /* no host memory is left */
  DM3D_NOT_PREPARED = 8   /* dm3d_plan_prepare has not succeeded */
} dm3d_result;

typedef struct dm3d_binding {
  const char *name;  /* lives as long as the plan */
  const char *dtype; /* fp32 fp16 i64 i32 i8 u8 */
  int is_output;
  uint32_t rank;
  uint64_t shape[6];
  uint64_t bytes;
} dm3d_binding;

typedef enum dm3d_word_kind {
  DM3D_COUNT = 0,   /* the true number of rows of a stage, above `capacity` where it overflowed */
  DM3D_DROPPED = 1, /* rows that were left out */
  DM3D_CUTOFF_M = 2 /* radius in metres beyond which cells were dropped, 0 where none was */
} dm3d_word_kind;

typedef struct dm3d_status_word {
  const char *name; /* lives as long as the plan */
  dm3d_word_kind kind;
  int32_t count;     /* of DM3D_COUNT and DM3D_DROPPED */
  float metres;      /* of DM3D_CUTOFF_M */
  uint64_t capacity; /* of DM3D_COUNT */
} dm3d_status_word;

enum { DM3D_FLAG_OVERFLOW = 1, DM3D_FLAG_DROPPED = 2, DM3D_FLAG_CUT_OFF = 4 };

typedef struct dm3d_status {
  uint32_t flags; /* what happened; whether the frame is used all the same is the caller's policy */
  uint32_t word_count;
  const dm3d_status_word *words; /* until the next call of dm3d_plan_status */
} dm3d_status;

/* Copies and checks a plan file. *plan is NULL unless the result is DM3D_OK. */
DM3D_API dm3d_result dm3d_plan_load(const void *bytes, size_t size, dm3d_plan **plan);

/* Loads the kernels for the current context's GPU and uploads the constants. */
DM3D_API dm3d_result dm3d_plan_prepare(dm3d_plan *plan);

/* Bytes of the workspace that the caller provides, aligned to 256; 0 for a null plan. */
DM3D_API uint64_t dm3d_plan_workspace_bytes(const dm3d_plan *plan);

/* Inputs come first, then outputs, in the order in which enqueue takes their addresses. */
DM3D_API uint32_t dm3d_plan_binding_count(const dm3d_plan *plan);
DM3D_API dm3d_result dm3d_plan_binding(const dm3d_plan *plan, uint32_t index, dm3d_binding *binding);

/* Launches every step on the stream. `bindings` are device addresses, aligned to 16 bytes. The driver may load kernels
 * at their first launch: let one frame pass before a CUDA graph captures this call. */
DM3D_API dm3d_result dm3d_plan_enqueue(dm3d_plan *plan, dm3d_stream stream, void *const *bindings, uint32_t count,
                              void *workspace, uint64_t workspace_bytes);

/* Waits for the stream and reads what the last run left, from the same addresses. */
DM3D_API dm3d_result dm3d_plan_status(dm3d_plan *plan, dm3d_stream stream, void *const *bindings, uint32_t count,
                             void *workspace, uint64_t workspace_bytes, dm3d_status *status);

/* Frees what the plan holds; its context must be current if it was prepared. NULL is allowed. */
DM3D_API void dm3d_plan_destroy(dm3d_plan *plan);

/* One sentence for a result, and what was wrong the last time that a call on this thread failed. */
DM3D_API const char *dm3d_result_text(dm3d_result result);
DM3D_API const char *dm3d_last_error(void);

#ifdef __cplusplus
}
#endif

#endif

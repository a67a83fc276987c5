//! The C library's allocator, set up for a process that is to stay small.

/// Has all threads share one heap; for the start of `main`, while there is one thread.
///
/// By default each has its own, and what the readers of manifests free stays theirs: a fifth of the resident memory with
/// 10,000 Services. The few threads of an agent hardly ever allocate at the same time.
pub fn share_one_heap() {
    // Other C libraries have one heap anyway.
    #[cfg(target_env = "gnu")]
    {
        // SAFETY: mallopt(3) takes two numbers; it races with nothing, as there is no other thread yet. Should it refuse,
        // everything works, in more memory.
        let _set = unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
    }
}

//! The C library's allocator, set up for a process that is to stay small.

/// From this size on a block has pages of its own, which go back to the kernel when it is freed.
///
/// The library's own bound grows with the largest block freed, and what was once needed for a moment (an answer of some
/// MiB, a file) would stay.
#[cfg(target_env = "gnu")]
const OWN_PAGES: libc::c_int = 256 << 10;

/// Has all threads share two heaps; for the start of `main`, while there is one thread.
///
/// By default each has its own, and what the readers of manifests free stays theirs: a fifth of the resident memory with
/// 10,000 Services. With a single one they wait for each other.
pub fn share_heaps() {
    // Other C libraries have one heap anyway.
    #[cfg(target_env = "gnu")]
    {
        // SAFETY: mallopt(3) takes two numbers; it races with nothing, as there is no other thread yet. Should it refuse,
        // everything works, in more memory.
        let _set = unsafe { (libc::mallopt(libc::M_ARENA_MAX, 2), libc::mallopt(libc::M_MMAP_THRESHOLD, OWN_PAGES)) };
    }
}

/// Gives free pages back to the kernel; for after something big. Takes some milliseconds, in which other threads may wait
/// for memory.
pub fn give_back() {
    #[cfg(target_env = "gnu")]
    {
        // SAFETY: malloc_trim(3) takes a number, and locks what it works on.
        let _released = unsafe { libc::malloc_trim(0) };
    }
}

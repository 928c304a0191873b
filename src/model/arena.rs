//! One piece of memory for all tensors of a model.

use super::ModelError;
use memmap2::{MmapMut, MmapOptions};
use std::ops::{Deref, DerefMut};

/// Where a tensor may start: a cache line, and the widest vector that a kernel loads.
pub const ALIGN_BYTES: usize = 64;
/// The size of x86-64's and aarch64's usual huge pages.
const HUGE_PAGE_BYTES: usize = 2 << 20;

/// Zeroed bytes, taken from the system when they are first written. On huge pages where the system has them:
/// filling 700 MB takes two thirds of the time then, for most of it is page faults.
pub struct Arena {
    map: MmapMut,
    start: usize,
    len: usize,
}

impl Arena {
    /// # Errors
    /// [`ModelError::Memory`] where the system refuses.
    pub fn new(len: usize) -> Result<Self, ModelError> {
        let refused = |source: std::io::Error| ModelError::Memory {
            bytes: len as u64,
            reason: source.to_string(),
        };
        let huge = len >= HUGE_PAGE_BYTES;
        let room = if huge { HUGE_PAGE_BYTES } else { ALIGN_BYTES };
        let size = len
            .checked_add(room)
            .ok_or_else(|| refused(std::io::ErrorKind::OutOfMemory.into()))?;
        let map = MmapOptions::new().len(size).map_anon().map_err(refused)?;
        let start = map.as_ptr().align_offset(room);
        #[cfg(target_os = "linux")]
        if huge {
            // Advice: a kernel without huge pages serves small ones.
            let _ = map.advise_range(memmap2::Advice::HugePage, start, len);
        }
        Ok(Self { map, start, len })
    }
}

impl Deref for Arena {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.map[self.start..self.start + self.len]
    }
}

impl DerefMut for Arena {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.map[self.start..self.start + self.len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arenas_are_aligned_zeroed_and_as_long_as_asked() {
        for len in [0, 1, 4097, (5 << 20) + 3] {
            let arena = Arena::new(len).unwrap();
            assert_eq!(arena.len(), len);
            assert_eq!(arena.as_ptr() as usize % ALIGN_BYTES, 0);
            assert!(arena.iter().all(|&b| b == 0));
        }
    }
}

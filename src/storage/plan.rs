//! Which bytes go where: a file cut into chunks of one size, each chunk a list of pieces of the caller's memory.
//!
//! A chunk is the unit of everything: one ranged request, one digest, one record of the cache's journal. Every
//! byte of the file belongs to exactly one piece of one chunk, so chunks can be filled side by side without a lock.

use super::StorageError;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;

/// Memory for one stretch of a file.
pub struct Segment<'a> {
    pub range: Range<u64>,
    pub bytes: &'a mut [u8],
}

/// A chunk that is being filled, from its start on.
pub(super) struct Chunk<'a> {
    pub(super) index: usize,
    pub(super) range: Range<u64>,
    pieces: Vec<&'a mut [u8]>,
    /// Where the next byte goes: a piece, and a place in it.
    next: (usize, usize),
    /// Where the next byte lies in the file.
    at: u64,
    /// Has seen all bytes so far, where a digest is wanted.
    hasher: Option<Box<blake3::Hasher>>,
}

/// What is read from a disk before it is hashed: as much as stays in a processor's own cache in between.
const READ_BYTES: usize = 256 << 10;

/// A chunk that is complete and will not be written again.
#[derive(Clone)]
pub(super) struct Landed<'a> {
    pub(super) index: usize,
    pub(super) start: u64,
    pub(super) pieces: Vec<&'a [u8]>,
}

/// Cuts a file of `size` bytes into chunks. The segments must cover it, in order and without gaps.
///
/// # Errors
/// [`StorageError::Protocol`] if they do not: the header promised another size than the object has.
pub(super) fn chunks(
    size: u64,
    chunk_bytes: u64,
    segments: Vec<Segment<'_>>,
) -> Result<Vec<Chunk<'_>>, StorageError> {
    let uncovered = |at| {
        StorageError::Protocol(format!(
            "the object has {size} bytes, its header describes {at}"
        ))
    };
    let mut chunks: Vec<Chunk<'_>> = Vec::new();
    let mut at = 0;
    for Segment { range, mut bytes } in segments {
        if range.start != at || range.end - range.start != bytes.len() as u64 || range.end > size {
            return Err(uncovered(range.end));
        }
        while !bytes.is_empty() {
            if chunks.last().is_none_or(|c| c.range.end == at) {
                chunks.push(Chunk {
                    index: chunks.len(),
                    range: at..(at + chunk_bytes).min(size),
                    pieces: Vec::new(),
                    next: (0, 0),
                    at,
                    hasher: None,
                });
            }
            let Some(chunk) = chunks.last_mut() else {
                break;
            };
            let room = usize::try_from(chunk.range.end - at).unwrap_or(usize::MAX);
            let (now, rest) = bytes.split_at_mut(room.min(bytes.len()));
            at += now.len() as u64;
            chunk.pieces.push(now);
            bytes = rest;
        }
    }
    if at == size {
        Ok(chunks)
    } else {
        Err(uncovered(at))
    }
}

/// Chunks of a file.
pub(super) fn chunk_count(size: u64, chunk_bytes: u64) -> usize {
    usize::try_from(size.div_ceil(chunk_bytes)).unwrap_or(usize::MAX)
}

impl<'a> Chunk<'a> {
    /// What is still missing of it.
    pub(super) fn rest(&self) -> Range<u64> {
        self.at..self.range.end
    }

    pub(super) fn is_full(&self) -> bool {
        self.at == self.range.end
    }

    /// Computes the digest from now on as the bytes arrive: they are in the processor's cache then, and would have to
    /// come back from memory once the chunk is full.
    pub(super) fn hash_on_the_way(&mut self) {
        let mut hasher = Box::new(blake3::Hasher::new());
        let mut before = usize::try_from(self.at - self.range.start).unwrap_or(usize::MAX);
        for piece in &self.pieces {
            let n = piece.len().min(before);
            hasher.update(&piece[..n]);
            before -= n;
        }
        self.hasher = Some(hasher);
    }

    /// Copies what fits, and gives back what does not.
    pub(super) fn write<'b>(&mut self, all: &'b [u8]) -> &'b [u8] {
        let mut bytes = all;
        while !bytes.is_empty() {
            let (piece, offset) = self.next;
            let Some(room) = self.pieces.get_mut(piece).map(|p| &mut p[offset..]) else {
                break;
            };
            let n = room.len().min(bytes.len());
            room[..n].copy_from_slice(&bytes[..n]);
            self.next = if n == room.len() {
                (piece + 1, 0)
            } else {
                (piece, offset + n)
            };
            self.at += n as u64;
            bytes = &bytes[n..];
        }
        if let Some(hasher) = &mut self.hasher {
            hasher.update(&all[..all.len() - bytes.len()]);
        }
        bytes
    }

    /// Reads all of it from where it lies in a file.
    pub(super) fn read_from(&mut self, file: &File) -> io::Result<()> {
        self.reset();
        let mut at = self.range.start;
        for part in self
            .pieces
            .iter_mut()
            .flat_map(|p| p.chunks_mut(READ_BYTES))
        {
            file.read_exact_at(part, at)?;
            at += part.len() as u64;
            if let Some(hasher) = &mut self.hasher {
                hasher.update(part);
            }
        }
        (self.next, self.at) = ((self.pieces.len(), 0), at);
        Ok(())
    }

    /// Begins anew: what was written proved wrong.
    pub(super) fn reset(&mut self) {
        (self.next, self.at) = ((0, 0), self.range.start);
        if let Some(hasher) = &mut self.hasher {
            hasher.reset();
        }
    }

    /// BLAKE3 of a full chunk.
    pub(super) fn digest(&self) -> [u8; 32] {
        if let Some(hasher) = &self.hasher {
            return hasher.finalize().into();
        }
        let mut hasher = blake3::Hasher::new();
        for piece in &self.pieces {
            hasher.update(piece);
        }
        hasher.finalize().into()
    }

    pub(super) fn land(self) -> Landed<'a> {
        Landed {
            index: self.index,
            start: self.range.start,
            pieces: self.pieces.into_iter().map(|p| &*p).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn segments<'a>(memory: &'a mut [Vec<u8>]) -> Vec<Segment<'a>> {
        let mut at = 0;
        let segment = |bytes: &'a mut Vec<u8>| {
            let range = at..at + bytes.len() as u64;
            at = range.end;
            Segment { range, bytes }
        };
        memory.iter_mut().map(segment).collect()
    }

    #[test]
    fn chunks_cover_every_byte_once_whatever_the_sizes() {
        // A small generator of cases: sizes of segments, zero among them, against sizes of chunks.
        let mut state = 7_u64;
        let mut random = |n: u64| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1);
            (state >> 33) % n
        };
        for _ in 0..500 {
            let mut memory: Vec<Vec<u8>> = (0..random(8))
                .map(|_| vec![0; random(40) as usize])
                .collect();
            let size = memory.iter().map(|m| m.len() as u64).sum();
            let chunk_bytes = 1 + random(50);
            let mut cut = chunks(size, chunk_bytes, segments(&mut memory)).unwrap();
            assert_eq!(cut.len(), chunk_count(size, chunk_bytes));
            let mut at = 0;
            for (i, chunk) in cut.iter_mut().enumerate() {
                assert_eq!((chunk.index, chunk.range.start), (i, at));
                assert!(
                    chunk.range.end == size || chunk.range.end - chunk.range.start == chunk_bytes
                );
                at = chunk.range.end;
                // In two parts, the second too long.
                let bytes: Vec<u8> = chunk.range.clone().map(|b| b as u8).collect();
                let middle = random(bytes.len() as u64 + 1) as usize;
                assert!(chunk.write(&bytes[..middle]).is_empty());
                if i % 2 == 0 {
                    chunk.hash_on_the_way();
                }
                assert_eq!(chunk.rest().start, chunk.range.start + middle as u64);
                let more = [&bytes[middle..], &[99; 3]].concat();
                assert_eq!(chunk.write(&more), [99; 3]);
                assert!(chunk.is_full());
                assert_eq!(chunk.digest(), <[u8; 32]>::from(blake3::hash(&bytes)));
            }
            assert_eq!(at, size);
            let all: Vec<u8> = memory.concat();
            assert_eq!(all, (0..size).map(|b| b as u8).collect::<Vec<u8>>());
        }
    }

    #[test]
    fn segments_that_leave_gaps_or_go_beyond_the_object_are_refused() {
        let cases: [(&[(u64, u64)], u64); 4] = [
            (&[(0, 4), (5, 9)], 9),
            (&[(0, 4)], 5),
            (&[(0, 6)], 5),
            (&[(1, 5)], 5),
        ];
        for (ranges, size) in cases {
            let ranges: Vec<Range<u64>> = ranges.iter().map(|&(start, end)| start..end).collect();
            let mut memory: Vec<Vec<u8>> = ranges
                .iter()
                .map(|r| vec![0; (r.end - r.start) as usize])
                .collect();
            let segments = ranges.iter().cloned().zip(&mut memory);
            let segments = segments.map(|(range, bytes)| Segment { range, bytes });
            assert!(chunks(size, 4, segments.collect()).is_err());
        }
    }
}

//! PNG and APNG, 8 bits a channel, grey or RGB (the third edition of the PNG specification).
//!
//! The encoder gives out what it has whenever it is asked to, so that a decoder can show the lines that are there while
//! the rest is still being made. What it gives out does not depend on when that happens.

use super::Picture;
use flate2::{Compression, Crc, write::ZlibEncoder};
use std::io::Write as _;
use std::time::Duration;

const SIGNATURE: [u8; 8] = *b"\x89PNG\r\n\x1a\n";

/// A complete PNG file.
pub fn encode(picture: &Picture) -> Vec<u8> {
    let mut file = header(picture.width, picture.height, picture.channels);
    let mut lines = Lines::new(picture.width, picture.channels);
    lines.add(&picture.pixels);
    chunk(&mut file, b"IDAT", &lines.finish());
    chunk(&mut file, b"IEND", &[]);
    file
}

/// The pixels of a PNG file; none if it is not one of 8 bits, grey or RGB.
pub fn decode(file: &[u8]) -> Option<Picture> {
    let mut reader = png::Decoder::new(std::io::Cursor::new(file))
        .read_info()
        .ok()?;
    let channels = match reader.output_color_type() {
        (png::ColorType::Grayscale, png::BitDepth::Eight) => 1,
        (png::ColorType::Rgb, png::BitDepth::Eight) => 3,
        _ => return None,
    };
    let mut pixels = vec![0; reader.output_buffer_size()?];
    let info = reader.next_frame(&mut pixels).ok()?;
    pixels.truncate(info.buffer_size());
    Some(Picture {
        width: info.width as usize,
        height: info.height as usize,
        channels,
        pixels,
    })
}

/// The start of every PNG file.
pub(super) fn header(width: usize, height: usize, channels: usize) -> Vec<u8> {
    let mut file = Vec::with_capacity(1024);
    file.extend_from_slice(&SIGNATURE);
    let mut fields = Vec::with_capacity(13);
    fields.extend_from_slice(&(width as u32).to_be_bytes());
    fields.extend_from_slice(&(height as u32).to_be_bytes());
    let colour = if channels == 1 { 0 } else { 2 };
    fields.extend_from_slice(&[8, colour, 0, 0, 0]);
    chunk(&mut file, b"IHDR", &fields);
    file
}

/// Length, type, data and checksum.
pub(super) fn chunk(file: &mut Vec<u8>, kind: &[u8; 4], data: &[u8]) {
    let mut crc = Crc::new();
    crc.update(kind);
    crc.update(data);
    file.extend_from_slice(&(data.len() as u32).to_be_bytes());
    file.extend_from_slice(kind);
    file.extend_from_slice(data);
    file.extend_from_slice(&crc.sum().to_be_bytes());
}

/// Compresses the lines of one picture.
pub(super) struct Lines {
    line_bytes: usize,
    channels: usize,
    /// The line above, black before the first.
    above: Vec<u8>,
    filtered: Vec<u8>,
    zlib: ZlibEncoder<Vec<u8>>,
}

impl Lines {
    pub(super) fn new(width: usize, channels: usize) -> Self {
        let line_bytes = width * channels;
        Self {
            line_bytes,
            channels,
            above: vec![0; line_bytes],
            filtered: Vec::with_capacity(line_bytes + 1),
            zlib: ZlibEncoder::new(Vec::new(), Compression::new(4)),
        }
    }

    pub(super) fn add(&mut self, pixels: &[u8]) {
        for line in pixels.chunks_exact(self.line_bytes) {
            self.filter(line);
            // A Vec takes every write.
            self.zlib
                .write_all(&self.filtered)
                .expect("lines are written to memory");
            self.above.copy_from_slice(line);
        }
    }

    /// What a decoder needs to show every line that was added.
    pub(super) fn flush(&mut self) -> Vec<u8> {
        self.zlib.flush().expect("lines are written to memory");
        std::mem::take(self.zlib.get_mut())
    }

    /// The rest.
    pub(super) fn finish(self) -> Vec<u8> {
        self.zlib.finish().expect("lines are written to memory")
    }

    /// As it is, or as the difference to the line above: an enlarged line is all zeros then. Digits are mostly black, where
    /// the other filters of PNG gain nothing.
    fn filter(&mut self, line: &[u8]) {
        let size = |bytes: &mut dyn Iterator<Item = u8>| -> u64 {
            bytes
                .map(|b| u64::from((b as i8).unsigned_abs()))
                .sum::<u64>()
        };
        let above = &self.above;
        let plain = size(&mut line.iter().copied());
        let up = size(&mut line.iter().zip(above).map(|(l, a)| l.wrapping_sub(*a)));
        let channels = self.channels;
        let left = |i: usize| if i < channels { 0 } else { line[i - channels] };
        let sub = size(&mut (0..line.len()).map(|i| line[i].wrapping_sub(left(i))));
        self.filtered.clear();
        if up == 0 || (up < plain && up <= sub) {
            self.filtered.push(2);
            self.filtered
                .extend(line.iter().zip(above).map(|(l, a)| l.wrapping_sub(*a)));
        } else if sub < plain {
            self.filtered.push(1);
            self.filtered
                .extend((0..line.len()).map(|i| line[i].wrapping_sub(left(i))));
        } else {
            self.filtered.push(0);
            self.filtered.extend_from_slice(line);
        }
    }
}

/// An animation that plays once and stays at its last picture, which is also what a viewer without animations shows.
/// All frames have one size; there is at least one.
pub fn encode_animation(frames: &[(Picture, Duration)]) -> Vec<u8> {
    let Some((last, _)) = frames.last() else {
        return Vec::new();
    };
    let mut file = header(last.width, last.height, last.channels);
    let mut control = Vec::new();
    control.extend_from_slice(&(frames.len() as u32).to_be_bytes());
    control.extend_from_slice(&1_u32.to_be_bytes());
    chunk(&mut file, b"acTL", &control);
    // Without a frame control before it, this picture is no part of the animation.
    chunk(&mut file, b"IDAT", &compressed(last));
    let mut sequence: u32 = 0;
    let mut next = || {
        sequence += 1;
        (sequence - 1).to_be_bytes()
    };
    for (picture, delay) in frames {
        let mut control = next().to_vec();
        control.extend_from_slice(&(picture.width as u32).to_be_bytes());
        control.extend_from_slice(&(picture.height as u32).to_be_bytes());
        control.extend_from_slice(&[0; 8]);
        let delay_ms = u16::try_from(delay.as_millis()).unwrap_or(u16::MAX);
        control.extend_from_slice(&delay_ms.to_be_bytes());
        control.extend_from_slice(&1000_u16.to_be_bytes());
        control.extend_from_slice(&[0, 0]);
        chunk(&mut file, b"fcTL", &control);
        let mut data = next().to_vec();
        data.extend_from_slice(&compressed(picture));
        chunk(&mut file, b"fdAT", &data);
    }
    chunk(&mut file, b"IEND", &[]);
    file
}

fn compressed(picture: &Picture) -> Vec<u8> {
    let mut lines = Lines::new(picture.width, picture.channels);
    lines.add(&picture.pixels);
    lines.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn picture(channels: usize, factor: usize) -> Picture {
        let pixels = (0..28 * 12 * channels)
            .map(|i| (i * factor % 251) as u8)
            .collect();
        Picture {
            width: 28,
            height: 12,
            channels,
            pixels,
        }
    }

    #[test]
    fn pixels_come_back() {
        for (channels, factor) in [(1, 37), (3, 37), (1, 0), (3, 1)] {
            let picture = picture(channels, factor);
            assert_eq!(decode(&encode(&picture)), Some(picture));
        }
    }

    #[test]
    fn animations_come_back_frame_by_frame_and_the_last_is_shown_without() {
        let ms = Duration::from_millis;
        let frames = [
            (picture(1, 3), ms(100)),
            (picture(1, 5), ms(100)),
            (picture(1, 7), ms(2000)),
        ];
        let file = encode_animation(&frames);
        let mut reader = png::Decoder::new(std::io::Cursor::new(&file))
            .read_info()
            .unwrap();
        let control = *reader.info().animation_control().unwrap();
        assert_eq!((control.num_frames, control.num_plays), (3, 1));
        let mut back = vec![0; reader.output_buffer_size().unwrap()];
        reader.next_frame(&mut back).unwrap();
        assert_eq!(back, frames[2].0.pixels, "what is shown without animation");
        for (expected, delay) in &frames {
            reader.next_frame(&mut back).unwrap();
            assert_eq!(back, expected.pixels);
            let frame = reader.info().frame_control().unwrap();
            assert_eq!(u128::from(frame.delay_num), delay.as_millis());
        }
    }
}

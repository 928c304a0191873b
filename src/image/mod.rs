//! PIXELS: pictures to sheets, PNG files and animations. Pure functions.

mod png;
mod sheet;

pub use png::{decode, encode, encode_animation};
pub use sheet::{Grid, Sheet, SheetEncoder, assemble, encode_sheet, enlarge};

/// 8-bit pixels, height x width x channels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Picture {
    pub width: usize,
    pub height: usize,
    /// 1 (grey) or 3 (RGB).
    pub channels: usize,
    pub pixels: Vec<u8>,
}

impl Picture {
    /// An all-black picture.
    pub fn black(width: usize, height: usize, channels: usize) -> Self {
        Self {
            width,
            height,
            channels,
            pixels: vec![0; width * height * channels],
        }
    }

    fn row(&self, y: usize) -> &[u8] {
        let bytes = self.width * self.channels;
        &self.pixels[y * bytes..(y + 1) * bytes]
    }
}
